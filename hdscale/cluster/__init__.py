"""The cluster room: SLURM environment, executors, requeue."""
