#!/usr/bin/env bash
# Here, before the call: bash prepare.sh TARGET [PYTHON]  builds the extension for sm_90a against PYTHON's torch and puts
# a copy of what is committed, the extension, Triton's kernels compiled by PYTHON's Triton and two pure Python packages that
# the machine lacks into TARGET. Carry TARGET, and run TARGET/tools/gpu_day/run.sh there.
set -euo pipefail
TARGET=$(mkdir -p "$1" && cd "$1" && pwd); PYTHON=${2:-python3}
cd "$(dirname "$0")/../.."
git archive HEAD | tar xf - -C "$TARGET"
rm -rf "$TARGET"/docs "$TARGET"/benchmarks/results
mkdir -p "$TARGET/.gpu-day/packages" "$TARGET/.gpu-day/triton"
"$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --upgrade --target "$TARGET/.gpu-day/packages" liger-kernel==0.8.5 gguf==0.19.0
cd "$TARGET"
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} "$PYTHON" setup.py build_ext --inplace >build.log 2>&1 || { tail -20 build.log; exit 1; }
rm -rf build build.log ./*.egg-info
du -sh .
