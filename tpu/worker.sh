#!/usr/bin/env bash
# On a TPU VM, where tpu/pod.sh calls it:
#   bash vibejax/tpu/worker.sh setup               Python >= 3.11 and this checkout, in ~/vibejax-venv
#   bash vibejax/tpu/worker.sh start COMMAND ...   as a service that is started again if it fails
#   bash vibejax/tpu/worker.sh logs | stop
# --dry-run, first, shows the commands and runs none.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tpu/launcher.sh"

UV=0.13.8 # fetches a Python where the image has none that is new enough
venv=$HOME/vibejax-venv

main() {
  local verb=${1-}
  case $verb in
    setup) setup ;;
    start)
      (($# >= 2)) || fail 'start: needs a command'
      start "${@:2}"
      ;;
    logs) execute sudo journalctl --unit=vibejax --output=cat --lines=200 --follow ;;
    stop) execute sudo systemctl stop vibejax ;;
    *) fail "'$verb': must be setup, start, logs or stop" ;;
  esac
}

setup() {
  PATH=$HOME/.local/bin:$PATH
  if ! command -v uv >/dev/null; then
    execute curl --location --silent --show-error --fail --output "$HOME/uv-install.sh" \
      "https://astral.sh/uv/$UV/install.sh"
    execute env UV_NO_MODIFY_PATH=1 sh "$HOME/uv-install.sh"
  fi
  # What the code verifier runs programs in.
  command -v bwrap >/dev/null || execute sudo apt-get install --yes --quiet bubblewrap
  # The image's own Python where it is new enough, else one that uv brings.
  execute uv venv --allow-existing --python '>=3.11,<3.14' "$venv"
  execute uv pip install --quiet --python "$venv/bin/python" --editable "${root}[tpu]"
  # No look at the devices: on a slice of several VMs it waits for all others.
  execute "$venv/bin/python" -c \
    'import sys, jax, vibejax; print("python", sys.version.split()[0], "jax", jax.__version__)'
}

start() {
  local file=$HOME/vibejax-command.sh
  # In a file, since systemd would read "$" in its arguments.
  if $dry_run; then
    printf '# %s:\n#   exec ' "$file"
    show "$@"
  else
    printf 'exec %s\n' "$(show "$@")" >"$file"
  fi
  # Started again whatever it failed of, but not for a configuration that cannot be read (2), and
  # not for ever. SIGTERM goes to the run alone, which has 30 s to save; verifiers end with it.
  execute sudo systemd-run --unit=vibejax --collect --uid="$(id -u)" --gid="$(id -g)" \
    --working-directory="$root" --setenv=HOME="$HOME" --setenv=PATH="$venv/bin:$PATH" \
    --property=Restart=on-failure --property=RestartSec=10 --property=RestartPreventExitStatus=2 \
    --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=6 \
    --property=KillMode=mixed --property=TimeoutStopSec=30 --property=LimitNOFILE=1048576 \
    bash "$file"
}

main "$@"
