"""The ways to heal a cut, and which of them to take: by the loss on held-out windows, each as it would be used."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import JointStatistics, joint_statistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality, compare_quality, healed_share
from linearpatch_kernels.evaluation.notes import Noted, warn
from linearpatch_kernels.forward import PLAIN, Run, Stream
from linearpatch_kernels.healing.least_squares import solving
from linearpatch_kernels.healing.refit import (
    Fitted,
    RefitRow,
    Shared,
    Step,
    dense_stream,
    refit,
    steps_of_cut,
)
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.healing.ways import AUTO, HEALS, Heal
from linearpatch_kernels.modeling.families import norm_eps, num_layers
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import Patch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import DEFAULT_RANK, FITS, UnusableFit, fit_patch, needs_normed_moments
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import own_state

# How many points of the healed share a stock model may lack and is still taken: it runs everywhere, at no cost.
_STOCK_MAY_LACK = 0.02


@dataclasses.dataclass(frozen=True)
class Healed:
    """A healed cut.

    Attributes:
        model: the shallower model; plan: what it is made by, with patches where ``heal`` has them.
        heal: of `HEALS`; rows: what the refit's fits came to, where there was one.
        found: per candidate, ``"dense"`` among them, its quality on the held-out windows; empty where nothing was
            compared.
    """

    model: PreTrainedModel
    plan: PrunePlan
    heal: Heal
    rows: Sequence[RefitRow] = ()
    found: Mapping[str, Quality] = dataclasses.field(default_factory=dict)


#: Called with a step, its new weights and its rows.
KeepStep = Callable[[Step, Mapping[str, Tensor], Sequence[RefitRow]], None]
#: The same with the way of healing in front.
Keep = Callable[[str, Step, Mapping[str, Tensor], Sequence[RefitRow]], None]


class Healer:
    """Heals the same cut in several ways; the dense model runs once up to the cut for all of them, and the layer in
    front of it is fitted once.

    Args:
        dense: the model before the cut; not changed.
        spans: what the cut removes.
        fit_windows [S, T], heldout_windows [H, T], settings, run: as for `refit`.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        spans: Sequence[Span],
        fit_windows: Tensor,
        heldout_windows: Tensor,
        *,
        settings: RefitSettings | None = None,
        run: Run = PLAIN,
    ) -> None:
        self._dense, self._settings, self._run = dense, settings or RefitSettings(), run
        self._windows = fit_windows, heldout_windows
        # No way changes anything before the layer in front of the first joint.
        self._depth = max(0, spans[0].start - 1)
        self._stream: Stream | None = None
        self._first: dict[Step, Fitted] = {}

    def by(
        self,
        way: Heal,
        plan: PrunePlan,
        *,
        done: Mapping[str, Tensor] | None = None,
        keep: KeepStep | None = None,
    ) -> Healed:
        """The plan of this cut, with the patches that a patched way puts at the joints, carried out and healed.

        Args:
            done, keep: as for `refit`.

        Raises:
            InputError: a patched way and a plan without patches, or what `refit` raises.
        """
        if way.patched and not has_patches(plan):
            raise InputError(f"the plan has no patch for heal={way.name!r}: name a fit, or heal by refit")
        its = plan if way.patched else without_patches(plan)
        student = apply_plan(self._dense, its)
        if not way.refitted:
            return Healed(student, its, way)
        again = _fitted_again(its) if way.patched else {}
        steps = steps_of_cut(
            its.kept_layers, num_layers(self._dense), self._settings.behind, in_front=way.stock or bool(again)
        )
        if self._stream is None:
            self._stream = dense_stream(self._dense, *self._windows, self._depth, self._run)
        result = refit(
            self._dense,
            student,
            steps,
            *self._windows,
            settings=self._settings,
            shared=Shared(self._stream, first=self._first),
            done=done,
            keep=keep,
            patch_for=functools.partial(self._patch_for, again) if again else None,
            run=self._run,
        )
        its = dataclasses.replace(its, refitted=tuple(step.index for step in steps))
        return Healed(result.model, _with_patches_of(its, result.model) if again else its, way, result.rows)

    def _patch_for(
        self, joints: Mapping[int, Joint], where: int, pairs: Iterable[tuple[Tensor, Tensor]]
    ) -> Patch | None:
        """The patch of a joint, fitted as the plan's was, on the stream that the student has there."""
        joint = joints[where]
        eps = norm_eps(self._dense) if needs_normed_moments(joint.fit) else None
        mine = joint_statistics(pairs, str(joint.span), eps=eps)
        every: list[JointStatistics] = self._run.processes.gather(mine)
        assert joint.patch is not None
        (patch,) = joint.patch
        rank = getattr(patch, "rank", 0) or DEFAULT_RANK
        try:
            with solving():
                return fit_patch(functools.reduce(operator.add, every), joint.fit, rank=rank)
        except UnusableFit:
            # The plan's is there, and stays.
            return None


def _fitted_again(plan: PrunePlan) -> dict[int, Joint]:
    """The plan's joints by their place in the student, where the patches of all can be fitted again: each is one patch
    of a known fit, with a layer on both sides."""
    joints = plan.joint_positions()
    again = all(
        joint.patch is not None and len(joint.patch) == 1 and joint.fit in FITS and 0 < where < len(plan.kept_layers)
        for where, joint in joints.items()
    )
    return joints if again else {}


def _with_patches_of(plan: PrunePlan, model: PreTrainedModel) -> PrunePlan:
    """The plan with the patches that stand in a model, in float32 on the CPU."""
    there = patches(model)
    joints = tuple(
        dataclasses.replace(joint, patch=copy.deepcopy(there[where]).to("cpu", torch.float32))
        for where, joint in plan.joint_positions().items()
    )
    return dataclasses.replace(plan, joints=joints)


def has_patches(plan: PrunePlan) -> bool:
    """Whether anything stands at a joint of the plan."""
    return any(joint.patch is not None for joint in plan.joints)


def without_patches(plan: PrunePlan) -> PrunePlan:
    """The same cut with nothing at its joints."""
    joints = tuple(dataclasses.replace(one, patch=None, fit="none") for one in plan.joints)
    return dataclasses.replace(plan, joints=joints)


def ways_of(heal: str, plan: PrunePlan) -> list[Heal]:
    """The ways that a name stands for: ``auto`` for all that the plan has what it takes for."""
    if heal != AUTO:
        return [HEALS.named(heal, also=[AUTO])]
    return [way for way in HEALS.values() if has_patches(plan) or not way.patched]


@own_state()
def heal_cut(
    dense: PreTrainedModel,
    plan: PrunePlan,
    fit_windows: Tensor,
    heldout_windows: Tensor,
    *,
    heal: str = AUTO,
    settings: RefitSettings | None = None,
    done: Mapping[str, Mapping[str, Tensor]] | None = None,
    keep: Keep | None = None,
    noted: Noted = warn,
    run: Run = PLAIN,
) -> Healed:
    """The plan carried out and healed; ``auto`` takes the way with the least held-out loss.

    ``auto`` prefers a stock model whose healed share is within 2 points of the best, and never takes what is worse than
    plain removal. A way with which the logits are not finite is left out, and a note says so.

    Args:
        plan: with the patches that a patched way puts at the joints.
        fit_windows [S, T], heldout_windows [H, T]: as for `refit`; ``auto`` compares on the latter, which choose the
            ridges, too.
        done, keep: as for `refit`, by way of healing.

    Raises:
        InputError: an unknown way, a patched one where the plan has no patch, or what `refit` raises.
    """
    ways = ways_of(heal, plan)
    healer = Healer(dense, plan.spans, fit_windows, heldout_windows, settings=settings, run=run)

    def healed(way: Heal) -> Healed:
        kept = None if keep is None else functools.partial(keep, way.name)
        return healer.by(way, plan, done=(done or {}).get(way.name), keep=kept)

    if heal != AUTO:
        return healed(ways[0])
    made = {way.name: healed(way) for way in ways}
    models = {"dense": dense, **{name: one.model for name, one in made.items()}}
    found = compare_quality(models, heldout_windows, noted=noted, progress=run.progress, processes=run.processes)
    return dataclasses.replace(made[decide(found)], found=found)


def decide(found: Mapping[str, Quality]) -> str:
    """The way that ``auto`` takes, from the qualities on held-out windows, with ``"none"`` and ``"dense"`` among them.

    Raises:
        InputError: no way has finite logits.
    """
    ways = [name for name in HEALS if name in found]
    if not ways or "dense" not in found:
        raise InputError(
            "no way to heal gives a model whose logits are finite on the held-out windows, nor does plain removal: "
            "load the model in bfloat16 or float32, or give another text"
        )
    best = min(ways, key=lambda name: found[name].loss)
    if "none" not in found or best == "none":
        return best
    shares = {name: healed_share(found["dense"], found["none"], found[name]) for name in ways}
    stock = [name for name in ways if HEALS[name].stock and shares[name] >= shares[best] - _STOCK_MAY_LACK]
    return min(stock, key=lambda name: found[name].loss, default=best)
