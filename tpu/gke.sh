#!/usr/bin/env bash
# TPU slices of a GKE cluster that has JobSet, from your own machine:
#   tpu/gke.sh image  --image IMAGE                     builds tpu/Dockerfile and pushes it
#   tpu/gke.sh nodes  NAME --slice 2xv5e-256 --cluster C --location L --zone Z [--spot]
#   tpu/gke.sh run    NAME --slice S --image IMAGE [--spot] [--service-account A] -- COMMAND ...
#   tpu/gke.sh xpk    NAME --slice S --image IMAGE --cluster C [--spot] -- COMMAND ...
#   tpu/gke.sh status NAME
#   tpu/gke.sh logs   NAME
#   tpu/gke.sh delete NAME                              SIGTERM: it saves and ends
# --dry-run, first, shows the commands and runs none; of `run` it prints the manifest.
#
# `nodes` makes a node pool for each slice; `run` fills in tpu/jobset.yaml and applies it with
# kubectl's current context; `xpk` is the same through XPK, whose clusters queue jobs. A run that
# was deleted goes on by the same command.
# shellcheck disable=SC2016  # ${...} is the manifest's, $(...) is Kubernetes'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tpu/launcher.sh

OPTIONS='--slice --image --cluster --location --zone --service-account'

main() {
  local verb=${1-} name=''
  shift || true
  if [[ $verb != image ]]; then
    name=${1-}
    require_name name "$name"
    shift
  fi
  parse "$OPTIONS" "$@"
  case $verb in
    image) image ;;
    nodes) nodes "$name" ;;
    run) run "$name" ;;
    xpk) xpk "$name" ;;
    status) execute kubectl get jobset,pods --selector="jobset.sigs.k8s.io/jobset-name=$name" ;;
    logs) execute kubectl logs --follow --prefix --max-log-requests=1024 --container=vibejax \
      --selector="jobset.sigs.k8s.io/jobset-name=$name" ;;
    delete) execute kubectl delete jobset "$name" ;;
    *) fail "'$verb': must be image, nodes, run, xpk, status, logs or delete" ;;
  esac
}

# Dies unless the options named are there: needs VERB OPTION...
needs() {
  local option
  for option in "${@:2}"; do
    [[ ${!option} ]] || fail "$1: needs --$option"
  done
}

image() {
  needs image image
  execute docker build --file tpu/Dockerfile --tag "$image" .
  execute docker push "$image"
}

nodes() {
  local i options
  needs nodes slice cluster location zone
  describe_slice "$slice"
  options=("--cluster=$cluster" "--location=$location" "--node-locations=$zone"
    "--machine-type=$machine" "--num-nodes=$hosts" --scopes=cloud-platform)
  ((hosts == 1)) || options+=("--tpu-topology=$topology")
  ! $spot || options+=(--spot)
  for ((i = 0; i < slices; i++)); do
    execute gcloud container node-pools create "$1-$i" "${options[@]}"
  done
}

run() {
  local text
  needs run slice image
  ((${#command[@]})) || fail 'run: needs -- and a command'
  text=$(manifest "$1")
  if $dry_run; then
    printf '# kubectl apply --filename=-\n%s\n' "$text"
  else
    kubectl apply --filename=- <<<"$text"
  fi
}

manifest() {
  local text words
  describe_slice "$slice"
  words=$(json_words "${command[@]}") || exit
  text=$(<tpu/jobset.yaml)
  $spot || text=$(grep --invert-match '# spot only$' <<<"$text")
  text=${text//'${NAME}'/"$1"}
  text=${text//'${SLICES}'/"$slices"}
  text=${text//'${HOSTS}'/"$hosts"}
  text=${text//'${SERVICE_ACCOUNT}'/"${service_account:-default}"}
  text=${text//'${ACCELERATOR}'/"$gke_accelerator"}
  text=${text//'${TOPOLOGY}'/"$topology"}
  text=${text//'${IMAGE}'/"$image"}
  # Last, so that nothing a command says is filled in.
  text=${text/'args: ${COMMAND}'/"args: $words"}
  printf '%s' "$text"
}

# Words as a JSON list, which YAML reads as one.
json_words() {
  local word joined=''
  for word in "$@"; do
    # Kubernetes would put variables there: $$ is a dollar sign to it.
    word=${word//'$('/'$$('}
    [[ $word != *[[:cntrl:]]* ]] || fail "command: $(printf %q "$word") holds a control character"
    word=${word//\\/\\\\}
    joined+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]' "${joined#, }"
}

xpk() {
  local options=()
  needs xpk slice image cluster
  ((${#command[@]})) || fail 'xpk: needs -- and a command'
  describe_slice "$slice"
  ! $spot || options+=(--spot)
  # XPK starts again what ended with 127 to 255, here also with 1 (a crash) and 75 (the watchdog),
  # and counts every start.
  # It runs a line of bash in a subshell that it sends SIGTERM to: `exec`, so that the run gets it.
  execute xpk workload create "--workload=$1" "--cluster=$cluster" "--tpu-type=$accelerator" \
    "--num-slices=$slices" "--docker-image=$image" --max-restarts=50 \
    --restart-on-exit-codes=1,75 --termination-grace-period-seconds=30 \
    ${options[@]+"${options[@]}"} "--command=exec $(show "${command[@]}")"
}

main "$@"
