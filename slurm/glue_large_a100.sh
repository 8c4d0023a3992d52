#!/bin/bash
#SBATCH --job-name=glue_large_a100
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=96G
#SBATCH --time=48:00:00
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# GLUE with T5-large (Table 1) on a single A100-80GB, two micro-batches a step.
# From the repository's root: sbatch [option of sbatch …] slurm/glue_large_a100.sh [key=value …]
# sbatch runs a copy of this file, so the repository is found by where it was submitted from, or by HDSCALE_ROOT.
root=${HDSCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$root/slurm/common.sh" || { echo "$root is not the repository: submit from its root, or set HDSCALE_ROOT" >&2; exit 2; }
hdscale_run configs/glue_large.yaml run.name=glue_large_a100 train.micro_batch_size=64 "$@"
