# What your site wants. Edit this file, or set the same variables in your shell; the scripts of this folder read it.
#
# 1. Read by sbatch itself. `bash slurm/glue_large.sh` sets them; before `sbatch slurm/…`, `source slurm/env.sh`.
#    An option on sbatch's command line comes before these, and these before the script's #SBATCH lines.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=a100

# 2. Set up inside the job, on each node.
# module load cuda/12.8
# HDSCALE_VENV=$HOME/venvs/hdscale         # a virtual environment to activate
# HDSCALE_CONTAINER=$HOME/hdscale.sif      # .sif: apptainer; anything else: srun --container-image (pyxis)
# HDSCALE_CONTAINER_ARGS="--bind /scratch" # more options for it

# 3. Network and hub.
# HDSCALE_INTERFACE=ib0                    # interface of NCCL and GLOO, where they choose the wrong one
# export HF_HUB_OFFLINE=0                  # compute nodes that do reach the hub (default: 1, `hdscale prepare` first)
