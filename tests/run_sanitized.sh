#!/usr/bin/env bash
# Builds the library with AddressSanitizer and UndefinedBehaviorSanitizer and runs tests on it:
#
#   tests/run_sanitized.sh                                   the operator tests
#   tests/run_sanitized.sh tests/test_gated_conv_masks.py    any arguments of pytest
#
# Needs g++ with its sanitizer libraries, and an environment with torch and the test extra. The installed package stays
# as it is: the sanitized one goes to a temporary folder. CXX and PYTHON choose another compiler and another Python.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
cxx=${CXX:-c++}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

USE_CUDA=0 PYKERNELS_SANITIZE=address,undefined "$python" -m pip install --quiet --no-deps --target "$site" "$root"

# Tests run from a copy beside the sanitized package: pytest puts its root folder first on the import path.
cp -r "$root/tests" "$root/bench" "$root/pyproject.toml" "$root/README.md" "$site"
cd "$site"
if [[ $# -eq 0 ]]; then
  # Not what compiles (builds, the emulator, torch.compile), nor what measures memory: the sanitizer keeps it for a while.
  # Nor what calls kernels a thousand times on tensors of one size.
  # The reference has no code of ours to look at, and what the tier of AVX-512 has is in that of AVX512-BF16 too.
  covered="reference"
  if grep -qw avx512_bf16 /proc/cpuinfo; then covered="reference and not avx512-"; fi
  set -- tests/test_random_bits.py tests/test_gated_conv_*.py tests/test_attention_pool_*.py tests/test_lora_linear_*.py \
    tests/test_child_update_*.py \
    -k "not compile and not distributed and not export and not memory and not ptx and not triton and not $covered \
      and not numerical_derivatives and not statistics and not trainer" \
    -n auto --dist loadfile
fi

# Python itself is not sanitized, so the runtime must be there before it; libstdc++ too, or exceptions are not intercepted.
# Python keeps memory until it ends: what looks like a leak is none. A report goes to stderr, past pytest's capture.
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "$python" -m pytest --capture=sys "$@"
