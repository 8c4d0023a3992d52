#!/bin/bash
#SBATCH --job-name=doctor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --time=00:20:00
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Can a run start on these nodes? GPUs, versions, clocks, file system, all-reduce; the last line is the verdict.
# From the repository's root: sbatch [option of sbatch …] slurm/doctor.sh [--config FILE] [key=value …]
# sbatch runs a copy of this file, so the repository is found by where it was submitted from, or by HDSCALE_ROOT.
root=${HDSCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
source "$root/slurm/common.sh" || { echo "$root is not the repository: submit from its root, or set HDSCALE_ROOT" >&2; exit 2; }
hdscale_doctor cluster.rendezvous_timeout=120 "$@"
