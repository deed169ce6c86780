"""Training what heals the joint against a teacher store, from the joint on.

Nothing before the first joint changes, so a step starts from the hidden state that enters it, kept in the store or
computed once without gradients, and runs patch and suffix alone. That is full training, exactly: the gradient of
everything before is never asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.distillation.recompute import recomputing
from linearpatch_kernels.distillation.settings import TrainingSettings
from linearpatch_kernels.distillation.teacher_store import TeacherBatch, TeacherStore
from linearpatch_kernels.distillation.trainable import Trainable, prepare
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.notes import Noted, warn
from linearpatch_kernels.files import (
    Entries,
    append_line,
    left_by_us,
    read_seal,
    reading,
    working_alone,
    write_sealed,
    write_whole,
)
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.forward import PartialRun
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.patched import joint_place, present_name
from linearpatch_kernels.modeling.views import linear_head
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from linearpatch_kernels.processes import Processes, need_accelerate
from linearpatch_kernels.torch_state import eval_mode, own_state

# Writing checkpoints may take one part in so many of a run: those of a whole suffix are large.
_SHARE_OF_CHECKPOINTS = 50

_STATE = "state.safetensors"
_LOG = "log.jsonl"
RUN_FILES = re.compile(r"((together|group-\d+)/)?(state\.safetensors|log\.jsonl)|group-\d+\.safetensors")
"""What the directory of a run holds, also that of a `hierarchical` one."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PARTS = ("parameter", "best", *_MOMENTS)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step reports: how many are done of how many, its loss, and how fast it goes."""

    done: int
    steps: int
    loss: float
    heldout: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a run went.

    Attributes:
        parameters: how many numbers were trained.
        steps: how many steps were made; best_step: whose parameters the student has now.
        curve: per look at the held-out windows its ``step`` and every loss measured (a KL in nats per token).
        log: the lines of the log, one a step.
        seconds: of training, looks included, earlier processes of this run too.
    """

    parameters: int
    steps: int
    best_step: int
    curve: tuple[dict[str, float], ...]
    log: tuple[dict[str, float], ...]
    seconds: float

    def heldout(self, step: int, loss: str = "tail") -> float:
        """The held-out KL after ``step`` steps."""
        return next(point[loss] for point in self.curve if point["step"] == step)


def joint_depth(student: PreTrainedModel, joint: int) -> int:
    """The depth from which a run starts: the joint's, but where it lies behind the last layer the one before that.

    The patch behind the last layer is a part of that layer.
    """
    return joint_place(joint, num_layers(student))[0]


class SuffixLoss(nn.Module):
    """The losses of a student from depth ``begin`` on, given the stream that enters it.

    Args:
        student: shares all its parameters with this module.
        precision: of the matrix products.
    """

    def __init__(self, student: PreTrainedModel, begin: int, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        weight = linear_head(student)
        self.whole = weight is None
        self.suffix = PartialRun(student, begin, "logits" if weight is None else "hidden")
        self.precision = precision
        # Not a parameter of this module: it is read, never trained, and converted once.
        self._head = [weight.detach().to(precision)] if weight is not None else []

    def forward(self, state: Tensor, probs: Tensor, ids: Tensor, losses: Sequence[str]) -> Tensor:
        """``losses`` [len(losses)] of states [B, T, d], true probabilities and ids [B, T, K]: means over the tokens."""
        mixed = torch.autocast(state.device.type, self.precision, enabled=self.precision != torch.float32)
        with mixed:
            hidden = self.suffix(state).flatten(0, 1)
        true, ids = probs.flatten(0, 1), ids.flatten(0, 1)
        found = []
        for loss in losses:
            target = true / true.sum(-1, keepdim=True) if loss == "topk" else true
            if self.whole:
                found.append(topk_kl_loss(hidden, target, ids, normalization=loss))
            else:
                head = self._head[0]
                found.append(linear_topk_kl_loss(hidden.to(head.dtype), head, target, ids, normalization=loss))
        return torch.stack(found)


@torch.no_grad()
def heldout_losses(
    student: PreTrainedModel, store: TeacherStore, joint: int, windows: Sequence[int], losses: Sequence[str] = ("tail",)
) -> dict[str, float]:
    """The means of ``losses`` over some windows of the store, in the student's own precision."""
    begin, device = joint_depth(student, joint), student.get_input_embeddings().weight.device
    measure = SuffixLoss(student, begin, student.get_input_embeddings().weight.dtype)
    total = torch.zeros(len(losses), dtype=torch.float64)
    with eval_mode(student):
        for window in windows:
            batch = store.batch([window], [begin])
            state = joint_state(student, batch, begin)
            total += measure(state, batch.probs.to(device), batch.ids.to(device), losses).double().cpu()
    return dict(zip(losses, (total / len(windows)).tolist(), strict=True))


@torch.no_grad()
def joint_state(student: PreTrainedModel, batch: TeacherBatch, begin: int) -> Tensor:
    """The stream that enters layer ``begin`` [B, T, d]: the store's, or that of the student's own prefix."""
    if begin not in batch.states:
        prefix: Tensor = PartialRun(student, "tokens", begin)(batch.input_ids)
        return prefix
    weight = student.get_input_embeddings().weight
    return batch.states[begin].to(weight.device, weight.dtype)


class Objective(Protocol):
    """Toward what a run trains; made for the student once what is trained is prepared.

    Attributes:
        module: ``module(*inputs, losses=names)`` is [len(names)], the losses of these names; it holds what is trained.
        weights: loss -> its weight in the sum that is minimised.
        measured: the losses that held-out windows are looked at with; the first chooses the best step.
        about: what tells this objective from others, for a checkpoint; JSON values.
    """

    module: nn.Module
    weights: Mapping[str, float]
    measured: Sequence[str]
    about: Mapping[str, Any]

    def inputs(self, windows: Sequence[int], label_weight: float = 0.0) -> tuple[Any, ...]:
        """What the module takes for these windows of the store, their next tokens mixed in with this weight."""
        ...


ObjectiveMaker = Callable[[PreTrainedModel, TeacherStore, int, TrainingSettings, torch.dtype], Objective]
"""Student, store, the depth from which to train, settings, precision of the matrix products -> objective."""


class JointObjective:
    """The Top-K KL of the student's output, from the joint on.

    Raises:
        InputError: a store with the states of other depths than the joint's.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        store: TeacherStore,
        begin: int,
        settings: TrainingSettings,
        precision: torch.dtype,
    ) -> None:
        if store.request.depths and begin not in store.request.depths:
            there = ", ".join(map(str, store.request.depths))
            raise InputError(f"the store holds the states of depth {there}, the run starts at {begin}")
        self._student, self._store, self._begin = student, store, begin
        self.module: nn.Module = SuffixLoss(student, begin, precision)
        self.weights: Mapping[str, float] = {settings.loss: 1.0}
        self.measured: Sequence[str] = list(dict.fromkeys(("tail", "topk", settings.loss)))
        self.about: Mapping[str, Any] = {}

    def inputs(self, windows: Sequence[int], label_weight: float = 0.0) -> tuple[Any, ...]:
        batch = self._store.batch(windows, [self._begin]).with_labels(label_weight)
        state = joint_state(self._student, batch, self._begin)
        return state, batch.probs.to(state.device), batch.ids.to(state.device)


@own_state()
def distill(
    student: PreTrainedModel,
    store: TeacherStore,
    *,
    joint: int,
    training: Sequence[int],
    heldout: Sequence[int],
    settings: TrainingSettings | None = None,
    directory: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
    processes: Processes | None = None,
    on_step: Callable[[Step], None] | None = None,
    noted: Noted = warn,
    objective: ObjectiveMaker = JointObjective,
) -> Distillation:
    """Train the student on the store's windows; it ends with the parameters of the best look at the held-out ones.

    With a ``directory`` the run can be killed at any moment: the same call goes on from its last checkpoint and, on
    the CPU, ends with the same weights bit for bit. Interrupted (Ctrl-C), it finishes its step and writes one. Memory
    beyond the student: the trained parameters five times in float32 (their own, the gradient, AdamW's moments, the
    best), the activations of the suffix for ``micro_batch`` windows.

    Equivalent to AdamW on ``topk_kl_loss(student(input_ids).logits, ...)`` with everything but the trained parameters
    frozen.

    Args:
        student: a patched or merged causal LM, changed in place; parameters it shares with another model are copied
            first.
        store: the teacher's answers; where it holds the joint's states, they are where a step starts.
        joint: the student's first joint or merged layer; nothing before it differs from the teacher.
        training, heldout: numbers of windows in the store.
        directory: for the checkpoint and the log.
        checkpoint_seconds: at least, between two checkpoints; 0: after every step.
        processes: of one global batch (data parallel, by accelerate).
        on_step: called after every step.
        noted: told where the log of an earlier process was damaged.
        objective: what is minimised; the loss of the settings, unless told.

    Raises:
        InputError: nothing to train, a store that does not fit, a directory of another run, a loss that is not finite.
    """
    settings, processes = settings or TrainingSettings(), processes or Processes()
    if not training or not heldout:
        raise InputError("training and held-out windows are needed, at least one of each: give more text")
    settings.check_processes(processes.count)
    store.check(student)
    store.check_windows([*training, *heldout])
    begin = joint_depth(student, joint)
    about = {
        "student": fingerprint_model(student),
        "store": store.request.to_json(),
        "joint": joint,
        "training": list(training),
        "heldout": list(heldout),
        "settings": dataclasses.asdict(settings),
        "processes": processes.count,
    }
    folder = None if directory is None else Path(directory).expanduser()
    alone = working_alone(folder, RUN_FILES) if folder is not None and processes.first else contextlib.nullcontext()
    with eval_mode(student), alone:
        processes.wait()
        trainable = prepare(student, begin, settings.train, lora_rank=settings.lora_rank, seed=settings.seed)
        try:
            half = trainable.dtype in (torch.float16, torch.bfloat16)
            precision = torch.bfloat16 if half else getattr(torch, settings.precision)
            goal = objective(student, store, begin, settings, precision)
            about["objective"] = dict(goal.about)
            run = _Run(goal, trainable, store.request.length, settings, processes, folder, about, noted)
            with recomputing(student, begin, settings.recompute):
                return run.finish(training, heldout, checkpoint_seconds, on_step)
        finally:
            trainable.release()


class _Run:
    """The state of a run: parameters, optimizer, best step, curve; what a checkpoint holds."""

    def __init__(
        self,
        objective: Objective,
        trainable: Trainable,
        length: int,
        settings: TrainingSettings,
        processes: Processes,
        folder: Path | None,
        about: dict[str, Any],
        noted: Noted = warn,
    ) -> None:
        self.noted = noted
        self.objective, self.trainable, self.length = objective, trainable, length
        self.settings, self.processes, self.folder, self.about = settings, processes, folder, about
        self.loss: nn.Module = objective.module
        self.accelerator: Any = None
        if processes.count > 1:
            device = next(iter(trainable.parameters.values())).device
            accelerate = need_accelerate()
            # A process without held-out windows of its own makes no forward pass in which to exchange buffers.
            options = accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)
            self.accelerator = accelerate.Accelerator(cpu=device.type == "cpu", kwargs_handlers=[options])
            self.loss = self.accelerator.prepare_model(self.loss)
        # foreach would sum in another order on another device; here it would only cost memory.
        self.optimizer = torch.optim.AdamW(
            trainable.groups(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
        )
        self.step, self.best_step, self.seconds = 0, 0, 0.0
        self.best = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
        self.curve: list[dict[str, float]] = []
        self.log: list[dict[str, float]] = []
        # Of the log's lines, so that a checkpoint knows whether they are those it was written after.
        self.log_digest = hashlib.sha256()

    def finish(
        self,
        training: Sequence[int],
        heldout: Sequence[int],
        checkpoint_seconds: float,
        on_step: Callable[[Step], None] | None,
    ) -> Distillation:
        self._resume()
        begin = saved = time.monotonic()
        pause = checkpoint_seconds
        earlier = self.seconds
        if not self.curve:
            self._look(heldout)
        with _noticing_interrupts() as interrupts:
            while self.step < self.settings.steps and not self._stopped():
                started = time.monotonic()
                line = self._train_step(self._windows_of(self.step, training))
                self.step += 1
                seconds = time.monotonic() - started
                tokens = self.settings.windows_per_step * self.length
                line = {"step": self.step, **line, "tokens_per_second": tokens / seconds}
                if self.settings.looks(self.step):
                    line |= {f"heldout_{name}": value for name, value in self._look(heldout).items() if name != "step"}
                self._write_log(line)
                self.seconds = earlier + time.monotonic() - begin
                started = time.monotonic()
                if started - saved >= pause or self.step == self.settings.steps or interrupts:
                    self._save()
                    saved = time.monotonic()
                    if checkpoint_seconds:
                        pause = max(checkpoint_seconds, _SHARE_OF_CHECKPOINTS * (saved - started))
                if interrupts:
                    raise KeyboardInterrupt
                if on_step is not None:
                    heldout_loss = self.curve[-1][self.objective.measured[0]]
                    speed = line["tokens_per_second"]
                    on_step(Step(self.step, self.settings.steps, line["loss"], heldout_loss, speed))
        with torch.no_grad():
            for name, parameter in self.trainable.parameters.items():
                parameter.copy_(self.best[name])
        return Distillation(
            self.trainable.count, self.step, self.best_step, tuple(self.curve), tuple(self.log), self.seconds
        )

    def _windows_of(self, step: int, training: Sequence[int]) -> list[int]:
        """The windows of a step, a function of its number: every epoch in an order of its own."""
        count, size = len(training), self.settings.windows_per_step
        chosen = []
        for position in range(step * size, (step + 1) * size):
            generator = torch.Generator().manual_seed(self.settings.seed + position // count)
            order = torch.randperm(count, generator=generator)
            chosen.append(training[int(order[position % count])])
        return chosen

    def _mine(self, windows: Sequence[int]) -> list[list[int]]:
        """This process's share of some windows, as micro-batches."""
        mine, size = windows[self.processes.rank :: self.processes.count], self.settings.micro_batch
        return [list(mine[i : i + size]) for i in range(0, len(mine), size)]

    def _losses(self, windows: Sequence[int], losses: Sequence[str], label_weight: float = 0.0) -> Tensor:
        result: Tensor = self.loss(*self.objective.inputs(windows, label_weight), losses=losses)
        return result

    def _train_step(self, windows: Sequence[int]) -> dict[str, float]:
        rate = self.settings.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = self._mine(windows)
        share = self.processes.count / len(windows)
        total = torch.zeros((), dtype=torch.float64)
        for i, micro in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            alone = self.accelerator is None or last
            # Only the last pass of a step has gradients to exchange.
            with contextlib.nullcontext() if alone else self.accelerator.no_sync(self.loss):
                losses = self._losses(micro, list(self.objective.weights), self.settings.label_weight)
                weights = losses.new_tensor(list(self.objective.weights.values()))
                loss = (losses @ weights) * (len(micro) * share)
                loss.backward()
            total += loss.detach().double().cpu()
        total = self._mean(total)
        norm = self._gradient_norm()
        if not math.isfinite(float(total)) or not math.isfinite(norm):
            raise InputError(
                f"the loss or its gradient is not finite at step {self.step + 1}: use a smaller `learning_rate`, or "
                "check the model's weights"
            )
        self.optimizer.step()
        return {"loss": float(total), "learning_rate": rate, "gradient_norm": norm}

    def _gradient_norm(self) -> float:
        parameters = list(self.trainable.parameters.values())
        limit = self.settings.clip or math.inf
        return float(nn.utils.clip_grad_norm_(parameters, limit, foreach=False))

    def _mean(self, value: Tensor) -> Tensor:
        """Over the processes."""
        if self.accelerator is None:
            return value
        mean: Tensor = self.accelerator.reduce(value.to(self.accelerator.device), reduction="mean").cpu()
        return mean

    @torch.no_grad()
    def _look(self, heldout: Sequence[int]) -> dict[str, float]:
        """Measure the held-out windows; remember the parameters if none were better."""
        measured = self.objective.measured
        total = torch.zeros(len(measured), dtype=torch.float64)
        for micro in self._mine(heldout):
            total += self._losses(micro, measured).double().cpu() * len(micro)
        means = self._mean(total) * self.processes.count / len(heldout)
        point = {"step": float(self.step), **dict(zip(measured, means.tolist(), strict=True))}
        chooses = measured[0]
        if not math.isfinite(point[chooses]):
            raise InputError(f"the held-out loss is not finite after {self.step} steps: use a smaller `learning_rate`")
        if all(point[chooses] < earlier[chooses] for earlier in self.curve):
            self.best_step = self.step
            for name, parameter in self.trainable.parameters.items():
                self.best[name].copy_(parameter)
        self.curve.append(point)
        return point

    def _stopped(self) -> bool:
        """Whether the last ``patience`` looks were no better than the best."""
        since = sum(point["step"] > self.best_step for point in self.curve)
        return 0 < self.settings.patience <= since

    def _write_log(self, line: dict[str, float]) -> None:
        self.log.append(line)
        self.log_digest.update(_log_line(line))
        if self.folder is not None and self.processes.first:
            append_line(self.folder / _LOG, json.dumps(line))

    def _save(self) -> None:
        if self.folder is None or not self.processes.first:
            return
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.trainable.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        about = {
            "run": self.about,
            "step": self.step,
            "best_step": self.best_step,
            "curve": self.curve,
            "seconds": self.seconds,
            "log": self.log_digest.hexdigest(),
        }
        write_sealed(self.folder / _STATE, tensors, about)

    @torch.no_grad()
    def _resume(self) -> None:
        """Go on where an earlier process of the same run wrote its last checkpoint, if there is one."""
        if self.folder is None:
            return
        log = self.folder / _LOG
        digest = self._load(self.folder) if left_by_us(self.folder / _STATE) else ""
        # A step behind the checkpoint is made again: its line too. The last line may be cut off.
        kept = _log_lines(log, self.step)
        for line in kept:
            self.log_digest.update(_log_line(line))
        if self.processes.first:
            if digest and self.log_digest.hexdigest() != digest:
                self.noted(f"{log} is damaged: figures of some steps are missing in it, or are others than they were")
            write_whole(log, b"".join(map(_log_line, kept)))
        self.log = kept
        self.processes.wait()

    def _load(self, folder: Path) -> str:
        """Take over the checkpoint in the folder; returns the digest of the log at that moment ("" if not known)."""
        state, cure = folder / _STATE, f"delete {folder} to start the training again"
        about, _ = read_seal(state, cure)
        with reading(state, cure):
            check_same_run(about["run"], self.about, folder)
            tensors = {present_name(name): tensor for name, tensor in load_file(state).items()}
            told = Entries(about)
            self.step = told.whole("step", most=self.settings.steps)
            self.best_step = told.whole("best_step", most=self.step)
            self.seconds = told.real("seconds")
            self.curve = [dict(zip(one.names, one.reals(), strict=True)) for one in told.each("curve")]
            for name, parameter in self.trainable.parameters.items():
                found = {part: tensors[f"{part}.{name}"].to(parameter.device) for part in _PARTS}
                if any(tensor.shape != parameter.shape for tensor in found.values()):
                    raise ValueError(f"{name} has another shape")
                parameter.copy_(found["parameter"])
                self.best[name] = found["best"]
                moments = {moment: found[moment] for moment in _MOMENTS}
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step), dtype=torch.float32),
                    **moments,
                }
            return str(about.get("log", ""))


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """InputError where the checkpoint in ``folder`` is of another run; it says what differs."""
    wanted = json.loads(json.dumps(wanted))
    there, here = ({**run, **run["settings"], **run["store"]} for run in (found, wanted))
    differing = [name for name in there if name not in ("settings", "store") and there[name] != here.get(name)]
    if differing or found != wanted:
        told = ", ".join(
            f"{name} {there[name]}" if isinstance(there[name], str | int | float) else name for name in differing
        )
        raise InputError(
            f"{folder} holds an unfinished run of other settings ({told or 'of another version'} there): give the same "
            "flags to go on, or delete it to start again"
        )


@contextlib.contextmanager
def _noticing_interrupts() -> Iterator[Sequence[int]]:
    """Ctrl-C is put into the list instead of breaking a step; a second one is as ever."""
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives, and none can be asked for
        yield noticed
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def notice(number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        noticed.append(number)

    signal.signal(signal.SIGINT, notice)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, before)


def _log_line(line: Mapping[str, float]) -> bytes:
    return (json.dumps(line) + "\n").encode()


_BEGINS = '{"step": '


def _log_lines(file: Path, steps: int) -> list[dict[str, float]]:
    """The lines of the first steps. InputError for a file that is no log."""
    if not file.exists():
        return []
    lines, foreign = [], False
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            told = Entries(json.loads(text))
            line = dict(zip(told.names, told.reals(), strict=True))
            step = told.whole("step", 1)
            told.real("loss")
        except (ValueError, RecursionError):
            # The line at which a kill cut the log off begins as every one does.
            foreign = foreign or not text.startswith(_BEGINS[: len(text)])
        else:
            # As it was written: a step is a whole number.
            lines.append({**line, "step": step})
    if foreign and not lines:
        raise InputError(f"{file} is no log of a training and in its way: move it, or give another directory")
    return [line for line in lines if line["step"] <= steps]
