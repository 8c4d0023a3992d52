# What the scripts of this folder share: hdscale_run CONFIG [key=value …] starts the ranks, one per GPU, by srun, and
# requeues the job when it was pre-empted, timed out or broke (see hdscale/cluster/batch.sh). hdscale_doctor
# [--config FILE] [key=value …] starts the same ranks to examine their nodes.
# Started with bash instead of sbatch, a script submits itself, with the account and partition of env.sh.

hdscale_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

hdscale_run() {
  local config=$1 argument arguments=() launch python log
  shift
  cd "$hdscale_root" || exit 2
  for argument in "$@"; do
    # a fresh start is wanted once: after a requeue the run must resume
    if [ "$argument" = --fresh ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then continue; fi
    arguments+=("$argument")
  done
  hdscale_find_launch

  log=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* StdOut=\([^ ]*\).*/\1/p')
  hdscale_begin --log "$log" --config "$config" "${arguments[@]}"
  "${launch[@]}" --kill-on-bad-exit=1 "${python[@]}" hdscale/train.py --config "$config" "${arguments[@]}" &
  hdscale_wait $!
  hdscale_end $? --config "$config" "${arguments[@]}"
}

hdscale_doctor() {
  local launch python
  cd "$hdscale_root" || exit 2
  hdscale_find_launch
  # a rank that cannot start is named by the others, so they are not ended with it
  "${launch[@]}" --kill-on-bad-exit=0 "${python[@]}" -m hdscale doctor --nodes "$@" 2>&1 | hdscale_verdict_last
  exit "${PIPESTATUS[0]}"
}

# passes lines on, the verdict after all others: srun has its own last words
hdscale_verdict_last() {
  local line verdict="not ready: the ranks gave no verdict; the lines above say why"
  while IFS= read -r line; do
    case $line in
      "ready: "* | "not ready: "*) verdict=$line ;;
      *) printf '%s\n' "$line" ;;
    esac
  done
  printf '%s\n' "$verdict"
}

# sets its caller's arrays launch (srun with one rank per GPU) and python, and hdscale_python for the batch shell
hdscale_find_launch() {
  # one rank per GPU: with fewer GPUs (sbatch --gpus-per-node=4) fewer tasks are started than there are slots for
  local nodes=${SLURM_JOB_NUM_NODES:-1} ranks=${SLURM_NTASKS_PER_NODE:-1}
  if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ] && [ "$ranks" -gt "$SLURM_GPUS_ON_NODE" ]; then
    ranks=$SLURM_GPUS_ON_NODE
  fi
  launch=(srun --nodes="$nodes" --ntasks="$((nodes * ranks))" --ntasks-per-node="$ranks" --cpu-bind=none)
  python=(python)
  case ${HDSCALE_CONTAINER:-} in
    "") ;;
    *.sif)
      python=(apptainer exec --nv ${HDSCALE_CONTAINER_ARGS:-} "$HDSCALE_CONTAINER" python)
      hdscale_python=("${python[@]}") ;;
    *)
      launch+=(--container-image="$HDSCALE_CONTAINER" ${HDSCALE_CONTAINER_ARGS:-})
      hdscale_python=(srun --nodes=1 --ntasks=1 --overlap --container-image="$HDSCALE_CONTAINER"
        ${HDSCALE_CONTAINER_ARGS:-} python) ;;
  esac
}

# the exit code of a background process, however often a signal interrupts the waiting
hdscale_wait() {
  local code
  while :; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

if [ -z "${SLURM_JOB_ID:-}" ]; then
  source "$hdscale_root/slurm/env.sh"
  command -v sbatch >/dev/null || { echo "$0: sbatch is not on the path: submit from a login node of the cluster" >&2; exit 2; }
  cd "$hdscale_root" && exec sbatch "$hdscale_root/slurm/$(basename "$0")" "$@"
fi
source "$hdscale_root/slurm/env.sh"
[ -z "${HDSCALE_VENV:-}" ] || source "$HDSCALE_VENV/bin/activate"
source "$hdscale_root/hdscale/cluster/batch.sh"
