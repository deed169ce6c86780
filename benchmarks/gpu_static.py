"""What can be said of the GPU kernels without a GPU: ``python benchmarks/gpu_static.py [--json FILE]``.

The command of `tools.gpu_model`, from any directory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # -P: only the checkout's tools, whatever the working directory holds.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "tools.gpu_model", *sys.argv[1:]])
