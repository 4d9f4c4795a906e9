# shellcheck shell=bash disable=SC2034  # what is set here is read by those who source it
# What the launchers share: their options, checks of what users write, and the slices that are sold.
# Sourced, not run. A command is an array from end to end, so no name is ever parsed by a shell.

# Sourced, these are the script's own arguments.
dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi

slice='' image='' cluster='' location='' zone='' project='' worker='' service_account=''
spot=false command=()

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# Prints a command as a shell would read it back.
show() {
  printf '%q' "$1"
  shift
  (($# == 0)) || printf ' %q' "$@"
  printf '\n'
}

# Runs a command, or shows it.
execute() {
  if $dry_run; then show "$@"; else "$@"; fi
}

# Dies unless $2, called $1 in the message, matches the whole of the pattern $3.
require() {
  [[ $2 =~ ^($3)$ ]] || fail "$1 $(printf %q "$2"): must match $3"
}

# A name that gcloud, Kubernetes and systemd all take.
require_name() {
  require "$1" "$2" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?'
}

# Reads options into the variables of their names, and what stands after -- into command:
#   parse '--slice --zone' "$@"      where these, and --spot, are all that may be
parse() {
  local known=$1 name
  shift
  while (($#)); do
    case $1 in
      --spot) spot=true ;;
      --)
        command=("${@:2}")
        return
        ;;
      *)
        [[ $1 == --* && " $known " == *" $1 "* ]] ||
          fail "$1: unknown; ${known// /, }, --spot, and -- before a command"
        (($# >= 2)) || fail "$1: needs a value"
        case $1 in
          --slice) ;; # describe_slice knows them
          --image) require "$1" "$2" '[a-z0-9][-a-zA-Z0-9._/:@]*' ;;
          --project) require "$1" "$2" '[a-z0-9][-a-z0-9:.]*' ;;
          --worker) require "$1" "$2" 'all|[0-9]+' ;;
          *) require_name "$1" "$2" ;;
        esac
        name=${1#--}
        printf -v "${name//-/_}" %s "$2"
        shift
        ;;
    esac
    shift
  done
}

# Reads a slice as it is sold, such as v5e-16 or 2xv5e-256, into
#   slices           how many
#   accelerator      gcloud's name of one
#   runtime          the image of its VMs; empty: sold through GKE alone
#   gke_accelerator  the node label
#   machine          a VM with 4 chips, as all here have
#   topology         of the chips
#   hosts            VMs of one slice
# v4, v5p and tpu7x count two cores a chip, v5e and v6e count chips.
describe_slice() {
  local name=$1 count chips cores=1
  slices=1
  if [[ $name =~ ^([1-9][0-9]{0,2})x(.+)$ ]]; then
    slices=${BASH_REMATCH[1]} name=${BASH_REMATCH[2]}
  fi
  count=${name##*-}
  case ${name%-*} in
    v5e) accelerator=v5litepod-$count runtime=v2-alpha-tpuv5-lite
      gke_accelerator=tpu-v5-lite-podslice machine=ct5lp-hightpu-4t ;;
    v6e) accelerator=v6e-$count runtime=v2-alpha-tpuv6e
      gke_accelerator=tpu-v6e-slice machine=ct6e-standard-4t ;;
    v4) accelerator=v4-$count runtime=tpu-ubuntu2204-base cores=2
      gke_accelerator=tpu-v4-podslice machine=ct4p-hightpu-4t ;;
    v5p) accelerator=v5p-$count runtime=v2-alpha-tpuv5 cores=2
      gke_accelerator=tpu-v5p-slice machine=ct5p-hightpu-4t ;;
    tpu7x) accelerator=tpu7x-$count runtime='' cores=2
      gke_accelerator=tpu7x machine=tpu7x-standard-4t ;;
    *) count=0 ;;
  esac
  case $cores-$count in
    1-4) topology=2x2 ;;
    1-8) topology=2x4 ;;
    1-16) topology=4x4 ;;
    1-32) topology=4x8 ;;
    1-64) topology=8x8 ;;
    1-128) topology=8x16 ;;
    1-256) topology=16x16 ;;
    2-8) topology=2x2x1 ;;
    2-16) topology=2x2x2 ;;
    2-32) topology=2x2x4 ;;
    2-64) topology=2x4x4 ;;
    2-128) topology=4x4x4 ;;
    2-256) topology=4x4x8 ;;
    2-512) topology=4x8x8 ;;
    2-1024) topology=8x8x8 ;;
    2-2048) topology=8x8x16 ;;
    *) fail "slice $(printf %q "$1"): nobody sells it; known are v5e-N and v6e-N (N chips, 4 to 256) and v4-N, \
v5p-N, tpu7x-N (N cores, 8 to 2048), N a power of two, and 2xSLICE for several" ;;
  esac
  chips=$((count / cores))
  hosts=$((chips / 4))
}
