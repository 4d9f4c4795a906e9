#!/usr/bin/env bash
# CUDA hosts under SLURM, one process a host with all its GPUs, from a login node:
#   tpu/slurm.sh --nodes=2 --gpus-per-node=8 --partition=P -- python -m vibejax.rl CONFIG ...
# What stands before -- goes to sbatch. --dry-run, first, shows the commands and runs none.
# `python` is that of the shell it is called from: activate the environment before.
#
# A job that is taken its nodes, or whose time ends, gets a SIGTERM, saves, ends with 143 and is
# queued again; so is, five times, one that the watchdog ended (75). It goes on by the same command.
#SBATCH --job-name=vibejax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vibejax-%j.log
#SBATCH --signal=TERM@120
set -euo pipefail

dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi
options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
if (($# < 2)); then
  echo 'slurm.sh: needs -- and a command' >&2
  exit 2
fi
shift
# Peers of a process that ended end by themselves (watchdog_s); --wait is for one that cannot.
step=(srun --kill-on-bad-exit=0 --wait=300 "$@")

if $dry_run || [[ -z ${SLURM_JOB_ID-} ]]; then
  # sbatch copies the script, so the job starts in the folder where it was called.
  submit=(sbatch ${options[@]+"${options[@]}"} "${BASH_SOURCE[0]}" -- "$@")
  if $dry_run; then
    printf '%q ' "${submit[@]}"
    printf '\n%s' '# in the job: '
    printf '%q ' "${step[@]}"
    printf '\n%s\n' "# and where that ends with 143, or with 75 five times: scontrol requeue \$SLURM_JOB_ID"
    exit
  fi
  exec "${submit[@]}"
fi

status=0
"${step[@]}" || status=$?
if ((status == 143 || (status == 75 && ${SLURM_RESTART_COUNT:-0} < 5))); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
