# Sourced by every batch script of hdscale: those in slurm/ and those that `hdscale launch` writes.
# Runs in the batch shell, on the first node of the job. The ranks are started by srun; this file prepares the
# environment that they inherit and decides, when they have ended, whether the job goes back into the queue.

# srun (SLURM >= 22.05) does not inherit sbatch's --cpus-per-task
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# compute nodes seldom reach the internet, and a hub that does not answer is waited for: `hdscale prepare` first
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export PYTHONUNBUFFERED=1
# srun --unbuffered gives the ranks a terminal; what they print goes to a file all the same
export TTY_COMPATIBLE=0
if [ -n "${HDSCALE_INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME=$HDSCALE_INTERFACE GLOO_SOCKET_IFNAME=$HDSCALE_INTERFACE
fi

# Signals are for the ranks, which save a checkpoint and leave. This shell must outlive them to requeue the job.
# With `sbatch --signal=B:USR2@…` it is the only one to get the signal: pass it on.
trap ':' TERM
trap 'scancel --signal=USR2 "$SLURM_JOB_ID" 2>/dev/null' USR2

hdscale_python=(${HDSCALE_PYTHON:-python})   # a command of several words, such as `apptainer exec image python`

# hdscale_begin (--launch DIR | --config FILE [key=value …]): checks the configuration and notes the start.
# Ends the job with 2 on a mistake in it, before any rank starts.
hdscale_begin() {
  # ranks write a user's mistake there: srun's exit code is the highest of all ranks', and those that it ends
  # because one has failed come to 143
  HDSCALE_ERROR_FILE=$("${hdscale_python[@]}" -m hdscale.cluster.batch begin "$@") || exit $?
  export HDSCALE_ERROR_FILE
}

# hdscale_end CODE (--launch DIR | --config FILE [key=value …]): what the ranks' exit code means for the job.
# 0: done. 2: the user's mistake. Anything else: again, unless SLURM has already ended or requeued the job
# (scancel, scontrol requeue, a time limit), or the job has come back too often without a newer checkpoint.
hdscale_end() {
  local code=$1 id=$SLURM_JOB_ID state answer
  shift
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
  "${hdscale_python[@]}" -m hdscale.cluster.batch end --code "$code" --state "${state:-UNKNOWN}" "$@"
  answer=$?
  [ ! -s "${HDSCALE_ERROR_FILE:-}" ] || code=2
  # 0 again, 3 not again; anything else: the question itself failed, and a sick node must not end the run
  [ "$answer" = 0 ] || [ "$answer" = 3 ] || [ "${SLURM_RESTART_COUNT:-0}" -ge "${HDSCALE_MAX_REQUEUES:-3}" ] || answer=0
  [ "$answer" != 0 ] || scontrol requeue "$id"
  exit "$code"
}
