#!/bin/bash
#SBATCH --job-name=summ_nli_base
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --mem=96G
#SBATCH --time=48:00:00
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Summarisation + NLI with T5-base (Tables 6 and 16): one node, 2 GPUs.
# From the repository's root: sbatch [option of sbatch …] slurm/summ_nli_base.sh [key=value …]
# sbatch runs a copy of this file, so the repository is found by where it was submitted from, or by HDSCALE_ROOT.
root=${HDSCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$root/slurm/common.sh" || { echo "$root is not the repository: submit from its root, or set HDSCALE_ROOT" >&2; exit 2; }
hdscale_run configs/summ_nli_base.yaml "$@"
