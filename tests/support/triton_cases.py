"""The Triton kernels in the interpreter, held to float64: ``python -m tests.support.triton_cases SEED COUNT``.

A program of its own, with TRITON_INTERPRET=1 and LINEARPATCH_BACKEND=triton, because both are read at import. The
first cases go once over the listed widths, one dtype after the other; the rest are random. The rule and the output are
those of `cpu_cases`. Ends with status 1 as well if a kernel was not reached.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any

import torch

from linearpatch_kernels.ops.hadamard_patch import triton as kernels
from tests.support.cpu_cases import DTYPES, LISTED, one_case

# Few and small: orders below the smallest that the kernels take, blocks along the diagonal, one and several tiles.
OTHERS = [12, 48, 64, 80, 96, 128, 144, 192, 256, 300, 336, 640, 1300]


def main(seed: int, count: int) -> int:
    assert kernels.INTERPRETED
    launches: Counter[str] = Counter()
    launch = kernels._launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        launches[kernel.fn.__name__] += 1
        launch(kernel, *arguments, **options)

    kernels._launch = counted
    chance = random.Random(seed)
    torch.manual_seed(seed)
    listed = [(d, DTYPES[(i + seed) % 3]) for i, d in enumerate(LISTED)]
    cases = listed[:count] + [(chance.choice(OTHERS), chance.choice(DTYPES)) for _ in range(count - len(listed))]
    failures = 0
    for d, dtype in cases:
        for line in one_case(d, dtype, chance):
            failures += 1
            print(line)
    print(f"{len(cases)} cases, {len({d for d, _ in cases})} widths, {dict(launches)}, {failures} wrong")
    names = {"hadamard_patch_kernel", "hadamard_patch_backward_kernel"}
    return 1 if failures or set(launches) != names or min(launches.values()) < count // 2 else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
