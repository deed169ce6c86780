"""One step of the GPU day: ``python -m tools.gpu_day STEP``; ``run.sh`` calls them in their order.

The backend is ``LINEARPATCH_BACKEND`` (cuda or triton). With ``DRY=1``, few and small calls on the CPU.
"""

from __future__ import annotations

import sys

from tools.gpu_day import surroundings  # noqa: F401 - first: it sets what the package reads when it is imported


def main(step: str, *more: str) -> int:
    if step == "hello":
        from tools.gpu_day.checks import hello

        return hello()
    if step == "check":
        from tools.gpu_day.checks import check

        return check(*map(int, more))
    if step == "small":
        from tools.gpu_day.checks import small_calls

        return small_calls() or 0
    if step == "few":
        from tools.gpu_day.operators import few_calls

        return few_calls() or 0
    if step == "losses":
        from tools.gpu_day.losses import times as loss_times

        return loss_times()
    if step == "host":
        from tools.gpu_day.losses import host

        return host()
    if step == "model":
        from tools.gpu_day.model import run

        return run()
    from tools.gpu_day.operators import times

    return times(step)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
