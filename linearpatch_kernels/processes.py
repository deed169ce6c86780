"""Whether this is one process or one of several that torchrun or accelerate started; accelerate knows how they talk.

What tells is the environment, and it may be wrong: an image or a notebook keeps ``WORLD_SIZE`` from another job, a
launcher on another machine died. So what it says is checked, and nobody waits for siblings without a word and a limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import said

MEETING_SECONDS = "LINEARPATCH_MEETING_SECONDS"
"""Environment variable: how long the first meeting of the processes may take."""

# torchrun and accelerate set all of these; of the ranks, and of where they meet.
_NUMBERS = ("RANK", "LOCAL_RANK", "MASTER_PORT")
_VARIABLES = ("WORLD_SIZE", *_NUMBERS, "MASTER_ADDR")
# A launcher starts its processes together, and they differ by the time of their imports. Without one, the variables may
# be leftovers, so that nobody comes.
_MEETING_OF_LAUNCHED, _MEETING = 600.0, 30.0
# A process that has met its siblings waits for as long as one works: on a shard, a group's training, the figures.
_PATIENCE = datetime.timedelta(days=7)
# Seconds until the first word about a meeting, and about other waiting; and from one word to the next.
_WORD_ABOUT_MEETING, _WORD_ABOUT_WAITING, _NEXT_WORD = 3.0, 60.0, 600.0


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


def launched_processes(meeting_seconds: float | None = None) -> Processes:
    """From the launcher's environment (``WORLD_SIZE`` and what belongs to it); they have met when this returns.

    Args:
        meeting_seconds: how long they may take to meet; None: ``$LINEARPATCH_MEETING_SECONDS``, else ten minutes under
            torchrun and accelerate, 30 seconds where somebody else set the variables.

    Raises:
        InputError: variables that are missing or make no sense, siblings that do not come, accelerate not installed.
    """
    count = _started()
    if count < 2:
        return Processes()
    # accelerate has to be told: without it, processes on CPUs would each believe to be alone.
    on_cpus = torch.accelerator.current_accelerator(check_available=True) is None
    accelerate = need_accelerate()
    options: dict[str, Any] = {"timeout": _PATIENCE}
    if not torch.distributed.is_initialized():
        rank = _checked_rank(count)
        store = _met(count, _limit() if meeting_seconds is None else meeting_seconds)
        options |= {"store": store, "rank": rank, "world_size": count}
    try:
        state = accelerate.PartialState(cpu=on_cpus, **options)
    except Exception as error:  # of the environment too: it reads more of it, such as what MPI sets
        raise InputError(f"the {count} processes cannot work together ({said(error)}): {_cure()}") from error

    def wait() -> None:
        with _with_siblings():
            state.wait_for_everyone()

    return Processes(state.process_index, state.num_processes, wait, state.device, _exchange)


def check_alone(command: str) -> None:
    """InputError where a launcher started several processes of a command that would do all its work in each."""
    if (count := _started()) > 1:
        raise InputError(
            f"{command} runs in one process and WORLD_SIZE={count} says that {count} were started: start it without "
            "torchrun, or unset WORLD_SIZE"
        )


def _started() -> int:
    """How many processes there are; InputError where the environment says something else than a number."""
    return _number("WORLD_SIZE", 1, 1) if os.environ.get("WORLD_SIZE") else 1


def _number(name: str, default: float, least: int = 0) -> int:
    """A whole number from the environment."""
    text = os.environ.get(name) or str(default)
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 1 << 31:
        raise InputError(f"{name}={text[:40]} in the environment is no number of processes here: {_cure()}")
    return value


def _cure() -> str:
    present = [name for name in _VARIABLES if os.environ.get(name)]
    return f"start them with torchrun or accelerate, or for one process unset {', '.join(present)}"


def _checked_rank(count: int) -> int:
    """This process's rank, all variables checked."""
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={count} says that {count} processes were started, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing in the environment: {_cure()}"
        )
    for name in _NUMBERS:
        _number(name, 0)
    rank = _number("RANK", 0)
    if rank >= count:
        raise InputError(f"RANK={rank} is not one of WORLD_SIZE={count} processes, counted from 0: {_cure()}")
    return rank


def _limit() -> float:
    """Seconds that the first meeting may take."""
    named = os.environ.get(MEETING_SECONDS)
    if not named:
        return _MEETING_OF_LAUNCHED if torch.distributed.is_torchelastic_launched() else _MEETING
    try:
        seconds = float(named)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _PATIENCE.total_seconds():
        raise InputError(f"{MEETING_SECONDS}={named[:40]} is no number of seconds: give one, such as 300")
    return seconds


def _met(count: int, seconds: float) -> Any:
    """The store through which all processes have met; InputError where they do not come."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    words = (
        f"waiting for {count - 1} more process{'es' * (count > 2)}, since WORLD_SIZE={count}: at {place}, for up to "
        f"{seconds:.0f} s"
    )
    try:
        with _told_while_waiting(words, _WORD_ABOUT_MEETING):
            rendezvous: Any = torch.distributed.rendezvous  # type: ignore[attr-defined]  # not in its __all__
            store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
        # Later they wait for each other's work, also the first time that one has something to tell.
        store.set_timeout(_PATIENCE)
    except Exception as error:
        raise InputError(
            f"WORLD_SIZE={count} says that {count} processes were started, and RANK={os.environ['RANK']} did not meet "
            f"the others at MASTER_ADDR:MASTER_PORT={place} within {seconds:.0f} s ({said(error)}): {_cure()} "
            f"({MEETING_SECONDS} sets another limit)"
        ) from error
    return store


@contextlib.contextmanager
def _told_while_waiting(words: str, first: float) -> Iterator[None]:
    """A word on stderr after so many seconds, and now and then from then on, until what is waited for has come."""
    done = threading.Event()

    def tell() -> None:
        waited, pause = first, first
        while not done.wait(pause):
            print(f"{words} ({waited:.0f} s by now)", file=sys.stderr, flush=True)
            waited, pause = waited + _NEXT_WORD, _NEXT_WORD

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


@contextlib.contextmanager
def _with_siblings() -> Iterator[None]:
    """Waiting for what siblings do; InputError where one of them is gone."""
    words = "waiting for the other processes; if one of them has ended, stop this one, and start all of them again"
    try:
        with _told_while_waiting(words, _WORD_ABOUT_WAITING):
            yield
    except RuntimeError as error:
        raise InputError(
            f"one of the processes has ended or cannot be reached ({said(error)}): see what it said, then start all of "
            "them again"
        ) from error


def _exchange(one: Any) -> list[Any]:
    # accelerate's own gathering of objects joins lists, and leaves out what is not one.
    found: list[Any] = [None] * torch.distributed.get_world_size()
    with _with_siblings():
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
