#!/usr/bin/env bash
# Called by make: creates the virtual environment and installs the project with everything it needs.
# FFCV needs a C++ compiler and the headers of OpenCV and libjpeg-turbo. Where they cannot be had, one line says so
# and the rest goes on: FFCV is one of several back ends.
set -euo pipefail
PYTHON=${PYTHON:-python3} TORCH=${TORCH:-torch} VENV=${VENV:-.venv}
FFCV_PACKAGES="libopencv-dev libturbojpeg0-dev pkg-config"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: Python 3.10 or newer is needed, $("$PYTHON" --version) found. Set PYTHON=/path/to/python3.x" >&2
    exit 2
}

have_headers() { command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg; }

install_headers() {
    have_headers && return 0
    command -v apt-get >/dev/null || return 1
    local sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || return 1
        sudo="sudo -n"
    fi
    echo "installing FFCV's system packages: $FFCV_PACKAGES"
    $sudo apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $FFCV_PACKAGES >/dev/null &&
        have_headers
}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
$PIP --upgrade pip
# PyTorch first, and by itself: the build that is asked for then satisfies the project's own requirement.
$PIP "$TORCH"
$PIP --editable ".[dev]"

if install_headers && $PIP --editable ".[ffcv]"; then
    echo "setup complete, with FFCV"
else
    echo "setup complete, WITHOUT FFCV (it needs a C++ compiler and: $FFCV_PACKAGES); the resident back end does not need it" >&2
fi
