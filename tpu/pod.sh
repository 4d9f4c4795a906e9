#!/usr/bin/env bash
# TPU VMs by queued resources, from your own machine:
#   tpu/pod.sh create NAME --slice v5e-16 --zone ZONE [--spot]   asks for them; returns at once
#   tpu/pod.sh status NAME --zone ZONE                           the request, until it is ACTIVE
#   tpu/pod.sh setup  NAME --zone ZONE                           this checkout's HEAD on every VM
#   tpu/pod.sh run    NAME --zone ZONE -- python -m vibejax.rl configs/rl_math.toml ...
#   tpu/pod.sh logs   NAME --zone ZONE [--worker K|all]          what it printed, and prints
#   tpu/pod.sh stop   NAME --zone ZONE                           SIGTERM: it saves and ends
#   tpu/pod.sh delete NAME --zone ZONE                           VMs and request
# --project P where gcloud has no default; --dry-run, first, shows the commands and runs none.
#
# `run` starts the same command on every VM of every slice, as a service that outlives the
# connection and is started again when it fails: processes find each other, and go on from the last
# checkpoint. Spot VMs that were taken do not come back: delete, create, setup and run again, with
# the run folder in a bucket.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tpu/launcher.sh

OPTIONS='--slice --zone --project --worker'

main() {
  (($# >= 2)) || fail 'tpu/pod.sh create|status|setup|run|logs|stop|delete NAME ...; its head explains'
  local verb=$1 name=$2
  shift 2
  require_name name "$name"
  parse "$OPTIONS" "$@"
  case $verb in
    create) create "$name" ;;
    status) gcloud_tpu describe "$name" '--format=value(state.state)' ;;
    setup) setup "$name" ;;
    run)
      ((${#command[@]})) || fail 'run: needs -- and a command'
      on_all "$name" bash vibejax/tpu/worker.sh start "${command[@]}"
      ;;
    logs) on "$name" "${worker:-0}" bash vibejax/tpu/worker.sh logs ;;
    stop) on_all "$name" bash vibejax/tpu/worker.sh stop ;;
    delete) gcloud_tpu delete "$name" --force --quiet ;;
    *) fail "$verb: must be create, status, setup, run, logs, stop or delete" ;;
  esac
}

gcloud_tpu() {
  local where=()
  [[ ! $zone ]] || where+=("--zone=$zone")
  [[ ! $project ]] || where+=("--project=$project")
  execute gcloud compute tpus queued-resources "$@" ${where[@]+"${where[@]}"}
}

create() {
  local nodes
  [[ $slice ]] || fail 'create: needs --slice, such as v5e-16'
  describe_slice "$slice"
  [[ $runtime ]] || fail "$slice: is sold through GKE alone; see tpu/gke.sh"
  if ((slices > 1)); then
    nodes=("--node-count=$slices" "--node-prefix=$1")
  else
    nodes=("--node-id=$1")
  fi
  ! $spot || nodes+=(--spot)
  gcloud_tpu create "$1" "${nodes[@]}" "--accelerator-type=$accelerator" "--runtime-version=$runtime"
}

setup() {
  local archive
  archive=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf $(printf %q "$archive")" EXIT
  execute git archive --prefix=vibejax/ --output="$archive/vibejax.tar.gz" HEAD
  gcloud_tpu scp "$archive/vibejax.tar.gz" "$1:" --node=all --worker=all
  on_all "$1" tar xzf vibejax.tar.gz
  on_all "$1" bash vibejax/tpu/worker.sh setup
}

# Runs a command on one worker of the first slice, or on all: on NAME WORKER COMMAND...
on() {
  local node=0 words
  [[ $2 != all ]] || node=all
  # The worker's shell reads the words back as they are here.
  words=$(show "${@:3}")
  gcloud_tpu ssh "$1" "--node=$node" "--worker=$2" "--command=$words"
}

on_all() {
  on "$1" all "${@:2}"
}

main "$@"
