"""Print the factors of the widths given: ``d m k`` and then the m * m signs of H_m, one width a line."""

from __future__ import annotations

import sys

from linearpatch_kernels.hadamard import paley_factor

for argument in sys.argv[1:]:
    h, k = paley_factor(int(argument))
    print(argument, len(h), k, *(int(sign) for sign in h.flatten()))
