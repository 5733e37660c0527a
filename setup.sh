#!/usr/bin/env bash
# Called by make: creates the virtual environment and installs the project with everything it needs.
# FFCV needs a C++ compiler and the headers of OpenCV and libjpeg-turbo, DALI a platform that it is built for, timm a
# torchvision that fits the PyTorch that is there. Where one cannot be had, one line says so and the rest goes on.
set -euo pipefail
PYTHON=${PYTHON:-python3} TORCH=${TORCH:-torch} VENV=${VENV:-.venv}
FFCV_PACKAGES="libopencv-dev libturbojpeg0-dev pkg-config"  # and Python.h, for a Python of the system

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: Python 3.10 or newer is needed, $("$PYTHON" --version) found. Set PYTHON=/path/to/python3.x" >&2
    exit 2
}

apt_install() {
    command -v apt-get >/dev/null || return 1
    local sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || return 1
        sudo="sudo -n"
    fi
    echo "installing system packages: $*"
    $sudo apt-get update -qq &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

has_python_header() {
    "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

has_headers() { command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg && has_python_header; }

install_headers() {
    has_headers && return 0
    local python_header=""
    has_python_header || python_header=python3-dev
    # shellcheck disable=SC2086  # a list of packages
    apt_install $FFCV_PACKAGES $python_header && has_headers
}

has_pip() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

# Debian's python3 comes without ensurepip: venv then leaves an environment without pip behind.
make_venv() { "$PYTHON" -m venv --clear "$VENV" >/dev/null 2>&1 && has_pip; }

has_pip || make_venv || { apt_install python3-venv && make_venv; } || {
    echo "error: $PYTHON -m venv $VENV does not work. Install the venv package of that Python (python3-venv)." >&2
    exit 2
}
PIP="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
$PIP --upgrade pip
# PyTorch first, and by itself: the build that is asked for then satisfies the project's own requirement.
$PIP "$TORCH"
$PIP --editable ".[dev]"

# DALI for the CUDA of the PyTorch that is there; its two builds install the same files, so never both.
dali_extra() {
    "$VENV/bin/python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version
import torch

for extra, package in (("dali", "nvidia-dali-cuda130"), ("dali-cu12", "nvidia-dali-cuda120")):
    try:
        version(package)
        break  # one is there already
    except PackageNotFoundError:
        continue
else:
    extra = "dali-cu12" if (torch.version.cuda or "13").startswith("12") else "dali"
print(extra)
PYTHON
}

torch_version() { "$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))'; }

# timm with the PyTorch that is there. A torchvision of another build installs and does not load: it goes again.
install_timm() {
    local constraint fresh="timm torchvision" package
    constraint=$(mktemp)
    echo "torch==$(torch_version)" >"$constraint"
    for package in timm torchvision; do
        "$VENV/bin/python" -m pip show --quiet "$package" >/dev/null 2>&1 && fresh=${fresh/$package/}
    done
    if $PIP --constraint "$constraint" --editable ".[timm]" && "$VENV/bin/python" -c "import timm" >/dev/null 2>&1; then
        rm "$constraint"
        return 0
    fi
    rm "$constraint"
    # shellcheck disable=SC2086  # a list of packages
    [ -z "${fresh// /}" ] || "$VENV/bin/python" -m pip uninstall --quiet --yes $fresh
    return 1
}

with="" without=""
if install_headers && $PIP --editable ".[ffcv]"; then
    with="FFCV"
else
    without="FFCV (it needs a C++ compiler and: $FFCV_PACKAGES)"
fi
if extra=$(dali_extra) && $PIP --editable ".[$extra]"; then
    with="${with:+$with, }DALI"
else
    without="${without:+$without, }DALI (it has builds for Linux alone)"
fi
if install_timm; then
    with="${with:+$with, }timm"
else
    without="${without:+$without, }timm (it needs a torchvision that fits torch $(torch_version))"
fi
echo "setup complete${with:+, with $with}"
if [ -n "$without" ]; then
    echo "left out: $without; neither the resident back end nor the networks of the project need it" >&2
fi
