"""`prune` with the ways to heal: what is written, going on after a kill, and what is refused before any work."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import linearpatch_kernels as lp
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.healing.choice import Healed
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.pruning.plan import parse_spans
from linearpatch_kernels.pruning.target import Target, layers_to_reach
from linearpatch_kernels.recipes import healing, searching
from linearpatch_kernels.settings import PruneSettings
from tests.support.field import linearpatch, logits, save_model, tiny

SMALL: dict[str, Any] = {"samples": 12, "length": 16, "rank": 4, "device": "cpu", "spans": "2:4"}


def prune(place: Path, output: Path, **settings: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return lp.prune(place / "dense", output=output, text=place / "numbers.txt", **{**SMALL, **settings})


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[Healed]:
    """The healed models of the recipe's calls."""
    seen: list[Healed] = []
    real = healing.heal_cut

    def watched(*given: Any, **named: Any) -> Healed:
        seen.append(real(*given, **named))
        return seen[-1]

    monkeypatch.setattr(healing, "heal_cut", watched)
    return seen


def test_a_refitted_model_is_a_stock_one_with_the_logits_it_had(
    place: Path, tmp_path: Path, in_memory: list[Healed]
) -> None:
    result = prune(place, tmp_path / "out", heal="refit")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model) is LlamaForCausalLM
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dense = json.loads((place / "dense" / "config.json").read_text())
    assert (config["architectures"], config["num_hidden_layers"]) == (["LlamaForCausalLM"], 4)
    assert {name for name in config.keys() - dense.keys() if "linearpatch" in name} == set()
    assert torch.equal(logits(model), logits(in_memory[0].model))
    assert result.summary["heal"] == "refit"
    assert [row["layer"] for row in result.summary["refit"]] == [1, *[2] * 4, *[3] * 4, 4]
    assert result.plan.joints[0].patch is None
    assert {"dense", "dropped (no patch)", "healed (refit)"} <= result.quality.keys()
    report = (tmp_path / "out" / "linearpatch" / "report" / "report.md").read_text()
    assert "of the layers 1, 2, 3 again" in report
    assert f"The final norm is {result.summary['refit'][-1]['scale']:.3f} times what it was." in report
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_a_patch_and_a_refit(place: Path, tmp_path: Path, in_memory: list[Healed]) -> None:
    result = prune(place, tmp_path / "out", heal="patch+refit", fit="low-rank")
    assert "healed (patch+refit, low-rank)" in result.quality
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.model_type == "linearpatch_llama"
    torch.testing.assert_close(logits(model), logits(in_memory[0].model))


def test_auto_says_what_it_compared(place: Path, tmp_path: Path) -> None:
    result = prune(place, tmp_path / "out", heal="auto")
    assert result.summary["heal"] in HEALS
    assert result.summary["heal_candidates"].keys() >= {"dense", "none", "refit"}


@pytest.mark.parametrize(
    ("named", "way", "fit"),
    [
        ({}, "auto", "auto"),
        ({"fit": "low-rank"}, "patch", "low-rank"),
        ({"fit": "auto"}, "patch", "auto"),
        ({"fit": "none"}, "none", "none"),
        ({"heal": "refit"}, "refit", "none"),
        ({"heal": "patch"}, "patch", "auto"),
        ({"heal": "auto", "fit": "low-rank"}, "auto", "low-rank"),
        ({"plan_only": True}, "patch", "auto"),
        ({"plan_only": True, "fit": "none"}, "none", "none"),
    ],
)
def test_what_the_fit_and_the_way_come_to(named: dict[str, Any], way: str, fit: str) -> None:
    found = healing.asked(PruneSettings(output=Path("out"), drop=1, **named))
    assert (found.way, found.fit) == (way, fit)


@pytest.mark.parametrize("heal", ["patch", "none"])
def test_without_a_refit_nothing_else_than_before_is_written(heal: str, place: Path, tmp_path: Path) -> None:
    fit = "low-rank" if heal == "patch" else "none"
    prune(place, tmp_path / "before", fit=fit)
    prune(place, tmp_path / "now", fit=fit, heal=heal)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "now")]
    assert weights[0] == weights[1]


class Killed(BaseException):
    """Like a signal: nothing that handles errors handles it."""


@pytest.mark.parametrize("heal", ["refit", "auto"])
def test_a_killed_run_goes_on_to_the_same_bits(
    heal: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(place, tmp_path / "whole", heal=heal)
    real, steps = healing.RefitWork.keep, []

    def keep(self: Any, way: str, step: Any, weights: Mapping[str, Any], rows: Sequence[Any]) -> None:
        real(self, way, step, weights, rows)
        steps.append(step)
        if len(steps) == 2:
            raise Killed

    monkeypatch.setattr(healing.RefitWork, "keep", keep)
    with pytest.raises(Killed):
        prune(place, tmp_path / "killed", heal=heal)
    assert (tmp_path / ".killed.refit").exists()
    monkeypatch.undo()
    arguments = ["--text", place / "numbers.txt", "--heal", heal, "-o", tmp_path / "killed"]
    small = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    assert linearpatch("prune", place / "dense", *arguments, *small) is None
    told = capsys.readouterr().err
    assert "going on from a refit that did not finish" in told
    # What it takes was told by the run that was killed.
    assert "beside the models" not in told
    for name in ("model.safetensors", "config.json", "linearpatch/plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    summaries = [json.loads((tmp_path / name / "linearpatch/summary.json").read_text()) for name in ("killed", "whole")]
    assert summaries[0].get("refit") == summaries[1].get("refit")
    assert not (tmp_path / ".killed.refit").exists()


def test_the_work_of_another_run_is_not_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(place, tmp_path / "whole", heal="refit", samples=16)
    with monkeypatch.context() as patched:
        patched.setattr(healing.Unfinished, "forget", lambda _: None)
        prune(place, tmp_path / "out", heal="refit")
    assert (tmp_path / ".out.refit").exists()
    prune(place, tmp_path / "out", heal="refit", samples=16)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heal": "refti"}, "no way to heal is called 'refti': choose one of none, patch, refit, patch.refit, auto"),
        ({"heal": "patch+refit", "fit": "none"}, "puts a patch at the joint and `fit` none is none"),
        ({"heal": "refit", "plan_only": True}, "`plan_only` writes no weights"),
        ({"heal": "refit", "fit": "low-rank"}, "`heal` refit puts no patch at the joint: leave `fit` out"),
        ({"fit": "low-rnk"}, "low-rank"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], words: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        prune(place, tmp_path / "out", **settings)
    assert not [*tmp_path.iterdir()]


def test_inspect_and_the_command_tell_of_the_refit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", place / "numbers.txt", "--heal", "auto", "-o", tmp_path / "out"]
    small = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    assert linearpatch("prune", place / "dense", *arguments, *small) is None
    told = " ".join(capsys.readouterr().out.split())
    assert "Ways to heal on held-out calibration windows" in told
    assert linearpatch("inspect", tmp_path / "out", "--json", tmp_path / "out.json") is None
    about = json.loads((tmp_path / "out.json").read_text())
    summary = json.loads((tmp_path / "out" / "linearpatch" / "summary.json").read_text())
    assert {name: about.get(name) for name in ("heal", "heal_candidates", "refit")} == {
        name: summary.get(name) for name in ("heal", "heal_candidates", "refit")
    }
    prune(place, tmp_path / "refitted", heal="refit")
    capsys.readouterr()
    assert linearpatch("inspect", tmp_path / "refitted") is None
    told = " ".join(capsys.readouterr().out.split())
    assert "held-out error of every least-squares fit" in told
    assert "mlp.down_proj" in told


def test_a_step_that_changes_nothing_is_told_once_after_a_kill(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Gemma the layer in front of a joint is left alone: no weight says that its step was taken."""
    save_model(tiny("gemma3_text"), tmp_path / "dense")
    (tmp_path / "numbers.txt").write_text((place / "numbers.txt").read_text())
    real, ways = healing.RefitWork.keep, []

    def keep(self: Any, way: str, *told: Any) -> None:
        real(self, way, *told)
        ways.append(way)
        if len(ways) == 1:
            raise Killed

    monkeypatch.setattr(healing.RefitWork, "keep", keep)
    with pytest.raises(Killed):
        prune(tmp_path, tmp_path / "out", heal="refit")
    rows = prune(tmp_path, tmp_path / "out", heal="refit").summary["refit"]
    assert [row["layer"] for row in rows] == [1, *[2] * 4, *[3] * 4, 4]


def test_a_refitted_model_is_distilled_from_its_first_new_weight_on(place: Path, tmp_path: Path) -> None:
    prune(place, tmp_path / "cut", heal="refit")
    plan = lp.PrunePlan.load(tmp_path / "cut")
    assert (plan.refitted, plan.first_change) == ((1, 2, 3), 1)
    settings = {"text": place / "numbers.txt", "length": 16, "top_k": 10, "heldout": 2, "steps": 2, "device": "cpu"}
    outcomes = []
    for name, more in (("plain", {}), ("kept", {"store_states": True})):
        with warnings.catch_warnings(action="ignore"):
            outcomes.append(
                lp.recipes.distill(
                    tmp_path / "cut", teacher=str(place / "dense"), output=tmp_path / name, **settings, **more
                )
            )
    # Nothing stands at the joint, so the layers are trained, from the states that teacher and student share.
    assert [one.about["train"] for one in outcomes] == ["suffix", "suffix"]
    before = load_file(tmp_path / "cut" / "model.safetensors")
    after = load_file(tmp_path / "plain" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed if ".layers." in name} == {"1", "2", "3"}
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert all(torch.allclose(after[name], kept[name], atol=1e-3) for name in after)
    assert lp.PrunePlan.load(tmp_path / "plain").refitted == plan.refitted


@pytest.mark.parametrize("refitted", [[4], [-1], ["1"], 3])
def test_a_plan_that_names_other_layers_is_refused(refitted: Any, place: Path, tmp_path: Path) -> None:
    prune(place, tmp_path / "out", heal="refit")
    file = tmp_path / "out" / "linearpatch" / "plan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "refitted": refitted}))
    with pytest.raises(InputError, match=r"plan\.json"):
        lp.PrunePlan.load(tmp_path / "out")


@pytest.mark.parametrize("score", ["healability", "healability-layers"])
def test_layers_are_chosen_by_what_heals_and_a_killed_search_goes_on(
    score: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"spans": None, "drop": 2, "score": score, "heal": "refit"}
    whole = prune(place, tmp_path / "whole", **settings)
    assert whole.plan.score == score
    assert sum(span.length for span in whole.plan.spans) == 2
    real, cuts = searching._Trials.keep, []

    def keep(self: Any, cut: str, loss: float) -> None:
        real(self, cut, loss)
        cuts.append(cut)
        if len(cuts) == 2:
            raise Killed

    monkeypatch.setattr(searching._Trials, "keep", keep)
    with pytest.raises(Killed):
        prune(place, tmp_path / "killed", **settings)
    assert (tmp_path / ".killed.search").exists()
    first = list(cuts)
    prune(place, tmp_path / "killed", **settings)
    assert not {*first} & {*cuts[2:]}
    for name in ("model.safetensors", "linearpatch/plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [*tmp_path.glob(".*")] == []


@pytest.mark.parametrize("score", ["cosine", "loss", "healability", "healability-layers", "bi"])
def test_a_target_of_quality_is_kept_as_the_search_measures_it(
    score: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, float] = {}
    real = searching._Trials.keep

    def keep(self: Any, cut: str, loss: float) -> None:
        told[cut] = loss
        real(self, cut, loss)

    monkeypatch.setattr(searching._Trials, "keep", keep)
    result = prune(place, tmp_path / "out", spans=None, target="1.02x-ppl", score=score, heal="refit")
    assert result.plan.score == score
    by_layers: dict[int, list[float]] = {}
    for cut, loss in told.items():
        by_layers.setdefault(sum(span.length for span in parse_spans(cut)) if cut else 0, []).append(loss)
    limit = told[""] + math.log(1.02)
    removed = sum(span.length for span in result.plan.spans)
    assert min(by_layers[removed]) <= limit
    assert removed + 1 not in by_layers or min(by_layers[removed + 1]) > limit
    assert [*tmp_path.glob(".*")] == []


@pytest.mark.parametrize("target", ["70%-size", "1.3x-decode"])
def test_a_target_of_weights_is_so_many_layers(target: str, place: Path, tmp_path: Path) -> None:
    result = prune(place, tmp_path / "out", spans=None, target=target, fit="none")
    removed = sum(span.length for span in result.plan.spans)
    dense = AutoModelForCausalLM.from_pretrained(place / "dense")
    assert removed == layers_to_reach(Target.parse(target), dense)
    whole = prune(place, tmp_path / "whole", spans=None, drop=removed, fit="none")
    assert whole.plan.spans == result.plan.spans


def test_a_plan_alone_cannot_be_made_by_fitting_weights() -> None:
    model = tiny()
    windows = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="`prune` chooses by it"):
        lp.plan_pruning(model, windows, windows, drop=1, score="healability", fit="none")
