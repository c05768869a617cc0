#!/usr/bin/env bash
# Make a virtual environment with opsin in it: scripts/bootstrap.sh VENV [EXTRAS]
#
# pip's own configuration (index, proxy, certificates) is honoured. The one decision taken here is which build of
# torch to get: plain torch on Linux brings some 6 GB of CUDA libraries, which a machine without a GPU cannot use.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
extras=${2:+[$2]}
python=${PYTHON:-python3}
cpu_torch="torch==2.13.0"
cpu_index="https://download.pytorch.org/whl/cpu"

say() { printf 'opsin: %s\n' "$*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "Python 3.11 or newer is needed; '$python' is $("$python" --version 2>&1). Name another: make PYTHON=python3.12 ..."
    exit 1
}

if ! "$python" -c 'import ensurepip' 2>/dev/null; then # Debian splits it off
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing Debian's python3-venv, which '$python -m venv' needs"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv >/dev/null
    else
        say "'$python' cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv"
        exit 1
    fi
fi

"$venv/bin/python" -m pip --version >/dev/null 2>&1 || {
    say "creating $venv"
    "$python" -m venv "$venv"
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

cpu_index_answers() {
    "$venv/bin/python" - "$cpu_index/torch/" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=5).close()
PY
}

has_torch() {
    "$venv/bin/python" - <<'PY' 2>/dev/null
import importlib.metadata, sys
sys.exit(tuple(map(int, importlib.metadata.version("torch").split(".")[:2])) < (2, 11))
PY
}

if ! has_torch; then
    if [ "$(uname -s)" != Linux ] || timeout 20 nvidia-smi >/dev/null 2>&1; then
        say "installing torch from your package index"
        pip install 'torch>=2.11'
    elif cpu_index_answers; then
        say "no NVIDIA GPU: installing $cpu_torch for CPUs from $cpu_index"
        pip install --index-url "$cpu_index" "$cpu_torch"
    else
        say "no NVIDIA GPU, and $cpu_index does not answer: installing $cpu_torch from your package index"
        pip install "$cpu_torch"
    fi
fi

say "installing opsin$extras"
pip install --editable ".$extras"
