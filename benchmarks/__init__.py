"""What the kernels and the recipes come to: `speed` beside peers, `studies` of quality, `results`, `notes`.

``python -m benchmarks`` measures the speed, ``python -m benchmarks publish`` writes the pages from the results.
"""

from pathlib import Path

# The README of 0.1.0 named the commands without their folders: `python -m benchmarks.distillation` still starts.
__path__ += [str(Path(__file__).with_name(folder)) for folder in ("studies", "speed")]
