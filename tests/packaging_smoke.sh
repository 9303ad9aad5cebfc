#!/usr/bin/env bash
# Installs pykernels the ways that people do, into fresh virtual environments (several minutes, mostly torch):
#
#   tests/packaging_smoke.sh
#
#   editable into an environment with the older torch, which must stay; the wheel built there into another environment;
#   the source distribution into an empty environment, which gets a torch; the older torch's wheel beside another torch,
#   that of PYTHON.
#
# PYTHON chooses the Python, OLD_TORCH the version that must stay.
set -euo pipefail

python=${PYTHON:-python3}
old=${OLD_TORCH:-2.13.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A copy, so that an editable installation of the sources stays as it is.
cp -r "$(cd "$(dirname "$0")/.." && pwd)" "$work/sources"
rm -rf "$work"/sources/{build,dist} "$work"/sources/pykernels/{_build.py,*.so}
unset PYKERNELS_BUILD_DIR
export TORCH_CUDA_ARCH_LIST=8.0 # one is enough here
cd "$work"

step() { printf '\n-- smoke, %d s: %s\n' "$SECONDS" "$1"; }
torch_of() { "$1/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))'; }
use() {
  "$1/bin/python" - <<'PYTHON'
import torch
import pykernels
import pykernels.models
from pykernels import _extension

assert _extension._C is not None, _extension.reason
x, weight = torch.randn(2, 9, 4), torch.randn(8, 4, 3)
torch.testing.assert_close(
    pykernels.gated_conv1d(x, weight, backend="cpu"), pykernels.gated_conv1d(x, weight, backend="reference")
)
print(f"works: torch {torch.__version__}, {pykernels.__file__}")
PYTHON
}

step "editable, beside torch $old"
"$python" -m venv editable
editable/bin/pip install --quiet "torch==$old" "setuptools>=77"
before=$(torch_of editable)
editable/bin/pip install --quiet -e sources
[[ $(torch_of editable) == "$before" ]] || { echo "torch $before was replaced by $(torch_of editable)"; exit 1; }
use editable

step "wheel, into another environment with torch $old"
export USE_CUDA=0 # once is enough
editable/bin/pip wheel --quiet --no-deps --wheel-dir dist ./sources
"$python" -m venv wheel
wheel/bin/pip install --quiet "torch==$old" dist/pykernels-*.whl
use wheel

step "source distribution, into an empty environment"
# Any torch would do; the newest one's CUDA libraries, once to build and once to run, take longer than all else here.
export PIP_CONSTRAINT=$work/constraint.txt PIP_BUILD_CONSTRAINT=$work/constraint.txt
echo "torch==$old" >constraint.txt
(cd sources && ../editable/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist("../dist")') >/dev/null
"$python" -m venv empty
empty/bin/pip install --quiet dist/pykernels-*.tar.gz
use empty

other=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')
step "the wheel for torch $old, beside torch $other"
"$python" -m pip install --quiet --no-deps --target beside dist/pykernels-*.whl
if refusal=$(PYTHONPATH=beside "$python" -c 'import pykernels' 2>&1); then
  echo "a library for torch $before was accepted by torch $other"; exit 1
fi
grep "ImportError: pykernels was built for torch $before" <<<"$refusal"
step "done"
