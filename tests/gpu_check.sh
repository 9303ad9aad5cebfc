#!/usr/bin/env bash
# Builds for the GPU that is here, runs the tests that need one, and measures: about four minutes. For a machine without network, with
# torch, nvcc, cmake, ninja and pybind11. PYTHON chooses the Python.
set -uo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
step() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

step "build"
capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || exit
[[ $capability == 9.0 ]] && capability=9.0a # with its own instructions
USE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} "$python" -m pip install -q --no-build-isolation --no-deps -e . || exit
"$python" -m pykernels.env | head -20

step "tests"
"$python" -m pytest -m cuda -q --maxfail=20 -p no:cacheprovider tests/test_*_cuda.py
status=$? # a crash of the tests does not keep the measurements

step "measurements"
"$python" -m bench gated_conv --device cuda --quick --dtype bf16
"$python" -m bench gated_conv --device cuda --quick --dtype fp32 --case "B64 L512"
"$python" -m bench attention_pool --device cuda --quick --dtype bf16
"$python" -m bench child_update --device cuda --quick --dtype fp32
exit "$status"
