#!/usr/bin/env bash
# Check the optimizers on one GPU, in at most six minutes: correctness, times, memory; one JSON file and one table.
#
#     bash examples/device_check.sh                       # on a CUDA or ROCm device; writes device_check.json
#     bash examples/device_check.sh --device cpu --smoke  # see that it runs
#     bash examples/device_check.sh --wheels              # beforehand, where there is a network
#
# Images for GPUs bring torch and Triton; what else the package needs can be fetched beforehand, as wheels for
# Python 3.12, into the folder .wheels, and is unpacked to a temporary folder here. PYTHON names another Python.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [ "${1:-}" = --wheels ]; then
    exec "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .wheels \
        geoopt==0.5.1 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing rpds-py
fi
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -d .wheels ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .wheels/*.whl
fi
PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" examples/device_check.py "$@"
