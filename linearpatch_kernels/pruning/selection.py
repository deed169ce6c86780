"""Which fit to keep: by loss on held-out calibration windows, every candidate run from the dense model's own states.

Nothing before a candidate's first joint changes, so all candidates share the dense model's pass over those layers: a
window costs one dense forward pass and, per candidate, the layers behind its first joint.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality, QualityMeters
from linearpatch_kernels.evaluation.notes import Noted, warn
from linearpatch_kernels.forward import PLAIN, End, PartialRun, Run, check_windows, model_logits, residual_stream
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.modeling.patched import joint_place
from linearpatch_kernels.modeling.views import bypassing, runs_from_a_layer
from linearpatch_kernels.pruning.apply import joint_maps
from linearpatch_kernels.pruning.fits import AUTO, DEFAULT_RANK, FITS, UnusableFit, fit_patch, fits_of
from linearpatch_kernels.pruning.plan import Joint, PrunePlan, checked_spans
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

DENSE = "dense"
"""The name under which :func:`compare_candidates` reports the model itself."""

# A cheaper patch wins when it heals at least this share of what the best one heals.
_AS_GOOD = 0.98


@own_state()
def compare_candidates(
    model: PreTrainedModel,
    windows: Tensor,
    candidates: Mapping[str, Sequence[Joint]],
    *,
    description: str = "comparing",
    noted: Noted | None = None,
    run: Run = PLAIN,
) -> dict[str, Quality]:
    """The quality of every candidate, and of the dense model under ``"dense"``, in one pass over ``windows`` [W, T].

    A candidate is the joints of one pruned model. Its quality is that of the model :func:`apply_plan` would build, with
    agreement and KL against ``model``; no model is built. Memory beyond the dense forward pass: one batch's logits
    twice, and its residual stream at every candidate's first joint. Where the layers run on more than the stream
    (`views.runs_from_a_layer`), every candidate runs from the tokens on.

    Of several processes every one calls this with the same arguments, runs its own stretch of the windows (all of
    them, where there are fewer windows than processes), and gets the qualities over all.

    Args:
        noted: where given, a candidate with logits that are not finite is left out instead of raising, and a note says
            so.

    Raises:
        InputError: windows that do not fit the model, spans that do not, activations that are not finite.
    """
    check_windows(model, windows)
    shared = 1 < run.processes.count <= len(windows)
    if shared:
        windows = windows.tensor_split(run.processes.count)[run.processes.rank]
    layers = num_layers(model)
    candidates = {name: sorted(joints, key=lambda joint: joint.span) for name, joints in candidates.items()}
    for joints in candidates.values():
        checked_spans([joint.span for joint in joints], layers)
    starts = sorted({joints[0].span.start for joints in candidates.values()})
    meters = QualityMeters((DENSE, *candidates), lenient=noted is not None)
    alone = runs_from_a_layer(model)
    make = _from_first_joint if alone else _from_tokens
    suffixes = {name: make(model, joints) for name, joints in candidates.items()}
    head = PartialRun(model, layers, "logits")
    with torch.no_grad(), evaluation_mode(model):
        for _, batch in run.batches(windows, description):
            states = residual_stream(model, batch, [*starts, layers])
            teacher = head(states[layers])
            meters.update(DENSE, teacher, batch, teacher)
            for name in [name for name in meters.names if name != DENSE]:
                given = states[candidates[name][0].span.start] if alone else batch
                meters.update(name, suffixes[name](given), batch, teacher)
    if shared:
        meters = functools.reduce(operator.add, run.processes.gather(meters))
    return meters.results(noted)


def _from_first_joint(model: PreTrainedModel, joints: Sequence[Joint]) -> Callable[[Tensor], Tensor]:
    """What a pruned model does from its first joint on, in the dense model's layers: a stream [B, T, d] to logits."""
    maps = joint_maps(model, PrunePlan(num_layers(model), tuple(joints)))
    ends: list[End] = [*(following.span.start for following in joints[1:]), "logits"]
    parts: list[nn.Module] = []
    for joint, end in zip(joints, ends, strict=True):
        patch = _as_built(model, joint, maps.get(joint.span))
        parts += [*([] if patch is None else [patch]), PartialRun(model, joint.span.end, end)]
    return nn.Sequential(*parts)


def _from_tokens(model: PreTrainedModel, joints: Sequence[Joint]) -> Callable[[Tensor], Tensor]:
    """What a pruned model does, in the dense model's layers: token ids [B, T] to logits."""
    maps = joint_maps(model, PrunePlan(num_layers(model), tuple(joints)))
    patches = {joint.span.end - 1: _as_built(model, joint, maps.get(joint.span)) for joint in joints}
    through = {layer: patch for layer, patch in patches.items() if patch is not None}
    gone = [layer for joint in joints for layer in range(joint.span.start, joint.span.end)]
    return functools.partial(model_logits, bypassing(model, gone, through))


def _as_built(model: PreTrainedModel, joint: Joint, patch: nn.Module | None) -> nn.Module | None:
    """A copy as the pruned model will hold it, where and in the dtype of the layer behind; the joint keeps its own."""
    if patch is None:
        return None
    layers = decoder_layers(model)
    place = next(layers[joint_place(joint.span.end, len(layers))[0]].parameters())
    return copy.deepcopy(patch).to(place.device, place.dtype)


@dataclasses.dataclass(frozen=True)
class FitChoice:
    """What the fit ``auto`` decided and why.

    Attributes:
        fit: the name of the fit that was kept.
        table: one row a candidate, best loss first: ``fit``, ``loss`` and ``perplexity`` on the held-out calibration
            windows, ``healed`` (share of what plain removal lost), ``parameters`` and ``flops_per_token`` of all its
            patches, ``kept``.
        candidates: every fit's joints; found: their qualities and the dense model's. A fit that could not be made or
            measured is in neither.
    """

    fit: str
    table: tuple[dict[str, Any], ...]
    candidates: Mapping[str, tuple[Joint, ...]]
    found: Mapping[str, Quality]

    @property
    def joints(self) -> tuple[Joint, ...]:
        """The joints with the kept fit's patches."""
        return self.candidates[self.fit]

    def structured(self) -> FitChoice:
        """The choice there would be without the dense maps; nothing is measured again."""
        return decide({fit: joints for fit, joints in self.candidates.items() if FITS[fit].structured}, self.found)


def usable_candidates(
    statistics: CalibrationStatistics,
    spans: Sequence[Span],
    fits: Mapping[str, str],
    *,
    rank: int = DEFAULT_RANK,
    noted: Noted = warn,
) -> dict[str, tuple[Joint, ...]]:
    """Candidates for :func:`compare_candidates`: those of ``fits`` (name -> fit) that this text allows.

    Of the others (a silent channel has no ratio of magnitudes) a note says why they are left out.

    Raises:
        InputError: an unknown fit, a rank that does not fit the width, moments that were not collected.
    """
    found = {}
    for name, fit in fits.items():
        try:
            found[name] = fitted_joints(statistics, spans, fit, rank=rank)
        except UnusableFit as error:
            noted(f"not a candidate: {error}" if name == fit else f"not a candidate, {name}: {error}")
    return found


def choose_fit(
    model: PreTrainedModel,
    windows: Tensor,
    statistics: CalibrationStatistics,
    spans: Sequence[Span],
    *,
    rank: int = DEFAULT_RANK,
    structured: bool = False,
    noted: Noted = warn,
    run: Run = PLAIN,
) -> FitChoice:
    """Fit every candidate on ``statistics``, compare them on held-out ``windows`` [W, T], keep the best.

    The lowest loss wins, and a cheaper patch (fewer operations per token) wins over it when it takes back at least 98
    % as much of the loss that plain removal costs. Plain removal is a candidate, so nothing that is worse wins.
    ``structured`` leaves the dense d x d map out. A fit that this text does not allow (a silent channel has no ratio of
    magnitudes), or with which the model's logits are not finite, is left out and a note says so. Processes share the
    candidates out to fit them, and then the windows to compare them.

    Raises:
        InputError: moments that were not collected, no usable candidate, or what :func:`compare_candidates` raises.
    """
    names = [fit.name for fit in fits_of(AUTO, structured=structured)]
    reasons: list[str] = []
    mine = names[run.processes.rank :: run.processes.count]
    fitted = usable_candidates(statistics, spans, {name: name for name in mine}, rank=rank, noted=reasons.append)
    each = run.processes.gather((fitted, reasons))
    for reason in (reason for _, given in each for reason in given):
        noted(reason)
    everything = {name: joints for usable, _ in each for name, joints in usable.items()}
    candidates = {name: everything[name] for name in names if name in everything}
    found = compare_candidates(model, windows, candidates, description="choosing the fit", noted=noted, run=run)
    return decide({name: joints for name, joints in candidates.items() if name in found}, found)


def decide(candidates: Mapping[str, tuple[Joint, ...]], found: Mapping[str, Quality]) -> FitChoice:
    """The choice of :func:`choose_fit` from qualities that are known already.

    Raises:
        InputError: no candidate.
    """
    if not candidates:
        raise InputError(
            "no fit gives a model whose logits are finite on the held-out windows, nor does plain removal: load the "
            "model in bfloat16 or float32, or give another text"
        )
    best = min(found[name].loss for name in candidates)
    dense, dropped = found[DENSE].loss, found["none"].loss if "none" in found else best
    good = [name for name in candidates if found[name].loss <= dropped - _AS_GOOD * (dropped - best)]
    fit = min(good, key=lambda name: (cost(candidates[name])[1], found[name].loss))
    table = [
        {
            "fit": name,
            "loss": found[name].loss,
            "perplexity": found[name].perplexity,
            "healed": (dropped - found[name].loss) / (dropped - dense) if dropped > dense else 0.0,
            "parameters": cost(joints)[0],
            "flops_per_token": cost(joints)[1],
            "kept": name == fit,
        }
        for name, joints in candidates.items()
    ]
    return FitChoice(fit, tuple(sorted(table, key=lambda row: row["loss"])), candidates, found)


def fitted_joints(
    statistics: CalibrationStatistics, spans: Sequence[Span], fit: str, *, rank: int = DEFAULT_RANK
) -> tuple[Joint, ...]:
    """The joints of ``spans``, each healed by ``fit``."""
    return tuple(Joint(span, fit_patch(statistics.at(span), fit, rank=rank), fit) for span in sorted(spans))


def cost(joints: Sequence[Joint]) -> tuple[int, int]:
    """(parameters, floating point operations per token) of the joints' patches together."""
    patches = [joint.patch for joint in joints if joint.patch is not None]
    return sum(patch.num_parameters for patch in patches), sum(patch.flops_per_token for patch in patches)
