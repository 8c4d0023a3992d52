#!/bin/bash
#SBATCH --job-name=glue_xxl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=480G
#SBATCH --time=48:00:00
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# GLUE with T5-XXL: four nodes of 8 GPUs.
# From the repository's root: sbatch [option of sbatch …] slurm/glue_xxl.sh [key=value …]
# sbatch runs a copy of this file, so the repository is found by where it was submitted from, or by HDSCALE_ROOT.
root=${HDSCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$root/slurm/common.sh" || { echo "$root is not the repository: submit from its root, or set HDSCALE_ROOT" >&2; exit 2; }
hdscale_run configs/glue_xxl.yaml "$@"
