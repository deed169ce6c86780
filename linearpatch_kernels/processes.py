"""Whether this is one process or one of several that torchrun or accelerate started; accelerate knows how they talk."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable
from typing import Any

import torch

from linearpatch_kernels.errors import InputError

# A process waits for as long as a sibling works: on a shard, a group's training, the figures of the report.
_PATIENCE = datetime.timedelta(days=7)


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among its siblings.

    Attributes:
        rank, count: which of how many.
        wait: returns when every sibling has called it.
        device: where this process computes; None: not decided by the launcher.
        exchange: takes what this one has and returns what each of them has, in the order of their ranks.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    device: Any = None
    exchange: Callable[[Any], list[Any]] = lambda one: [one]

    def gather(self, one: Any) -> list[Any]:
        """``one`` of every sibling, in the order of their ranks; every sibling has to call it."""
        return self.exchange(one)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0


def launched_processes() -> Processes:
    """From the launcher's environment (``WORLD_SIZE``). InputError where several run and accelerate is missing."""
    if _started() < 2:
        return Processes()
    # accelerate has to be told: without it, processes on CPUs would each believe to be alone.
    on_cpus = torch.accelerator.current_accelerator(check_available=True) is None
    state = need_accelerate().PartialState(cpu=on_cpus, timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone, state.device, _exchange)


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE") or "1")


def check_alone(command: str) -> None:
    """InputError where a launcher started several processes of a command that would do all its work in each."""
    if (count := _started()) > 1:
        raise InputError(f"{command} runs in one process and {count} were started: start it without torchrun")


def _exchange(one: Any) -> list[Any]:
    # accelerate's own gathering of objects joins lists, and leaves out what is not one.
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, one)
    return found


def need_accelerate() -> Any:
    """The module ``accelerate``."""
    try:
        import accelerate
    except ImportError as error:
        raise InputError(
            "several processes need accelerate, which is not installed: pip install 'linearpatch-kernels[train]'"
        ) from error
    return accelerate
