"""The ways to heal a cut, and which of them to take: by the loss on held-out windows, each as it would be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality, compare_quality, healed_share
from linearpatch_kernels.evaluation.notes import Noted, warn
from linearpatch_kernels.forward import PLAIN, Run, Stream
from linearpatch_kernels.healing.refit import (
    RefitRow,
    RefitSettings,
    Step,
    dense_stream,
    refit,
    shared_depth,
    steps_of_cut,
)
from linearpatch_kernels.healing.ways import AUTO, HEALS, Heal
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import PrunePlan
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


#: Called with the way of healing, the step, its new weights and its rows.
Keep = Callable[[str, Step, Mapping[str, Tensor], Sequence[RefitRow]], None]


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
    if heal != AUTO:
        HEALS.named(heal, also=[AUTO])
    bare = dataclasses.replace(
        plan, joints=tuple(dataclasses.replace(one, patch=None, fit="none") for one in plan.joints)
    )
    has_patches = any(joint.patch is not None for joint in plan.joints)
    if heal != AUTO and HEALS[heal].patched and not has_patches:
        raise InputError(f"the plan has no patch for heal={heal!r}: name a fit, or heal by refit")
    ways = [way for way in HEALS.values() if heal in (way.name, AUTO) and (has_patches or not way.patched)]
    settings = settings or RefitSettings()
    stream: Stream | None = None
    made: dict[str, Healed] = {}
    for way in ways:
        its = plan if way.patched else bare
        student, rows = apply_plan(dense, its), []
        if way.refitted:
            steps = steps_of_cut(its.kept_layers, num_layers(dense), settings.behind, in_front=way.stock)
            if stream is None:
                depth = shared_depth(dense, student, steps)
                stream = dense_stream(dense, fit_windows, heldout_windows, depth, run)
            result = refit(
                dense,
                student,
                steps,
                fit_windows,
                heldout_windows,
                settings=settings,
                stream=stream,
                done=(done or {}).get(way.name),
                keep=None if keep is None else lambda *told, name=way.name: keep(name, *told),
                run=run,
            )
            student, rows = result.model, result.rows
        made[way.name] = Healed(student, its, way, rows)
    if heal != AUTO:
        return made[heal]
    models = {"dense": dense, **{name: one.model for name, one in made.items()}}
    found = compare_quality(models, heldout_windows, noted=noted, progress=run.progress)
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
