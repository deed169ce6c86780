"""What stands beside a result for comparison decides neither whether there is one nor which; what is worse says so."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import JointStatistics, Moments, Span, calibrate
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality, compare_quality, told_if_worse
from linearpatch_kernels.healing import merges
from linearpatch_kernels.healing.merge_search import influence_shares, plan_merging
from linearpatch_kernels.healing.refit import Refit
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import DensePatch
from linearpatch_kernels.pruning import selection
from linearpatch_kernels.pruning.fits import AUTO, FITS, UnusableFit, fit_patch, fits_of, too_little_text
from linearpatch_kernels.pruning.plan import Joint
from linearpatch_kernels.pruning.search import plan_pruning, sweep
from linearpatch_kernels.pruning.selection import choose_fit, compare_candidates, usable_candidates
from tests.support.field import IDS, SMALL, linearpatch, save_model, text_file, tiny


def token_windows(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def silent(what: str) -> PreTrainedModel:
    """deepcompressor #5, lmdeploy #1786, GPTQModel #2331: channels that no token moves, in one domain or the other."""
    model = tiny(hidden_size=64, head_dim=16)
    with torch.no_grad():
        writers = [model.model.embed_tokens.weight]
        for layer in model.model.layers:
            writers += [layer.self_attn.o_proj.weight.T, layer.mlp.down_proj.weight.T]
        for writer in writers:
            if what == "dead":
                writer[:, 7] = 0
            else:
                writer[:, 1::2] = writer[:, 0::2]
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    text_file(folder)
    save_model(tiny(), folder / "dense")
    for what in ("dead", "doubled"):
        save_model(silent(what), folder / what)
    return folder


def prune(place: Path, model: str, output: Path, *more: Any) -> Exception | None:
    text = [] if "--text" in more else ["--text", place / "numbers.txt"]
    return linearpatch("prune", place / model, "--drop", 2, "-o", output, *text, *SMALL, *more)


@pytest.mark.parametrize("fit", ["auto", "none", "scalar", "low-rank", "least-squares"])
@pytest.mark.parametrize("model", ["dead", "doubled"])
def test_a_fit_is_made_where_that_of_a_row_for_comparison_is_not(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, fit: str
) -> None:
    assert prune(place, model, tmp_path / "out", "--fit", fit) is None
    pruned, _ = load_model(tmp_path / "out", device="cpu")
    with torch.no_grad():
        assert bool(pruned(IDS).logits.isfinite().all())
    said = " ".join(capsys.readouterr().err.split())
    report = next((tmp_path / "out").rglob("report.md")).read_text()
    quality = json.loads(next((tmp_path / "out").rglob("summary.json")).read_text())["quality"]
    if model == "doubled":
        assert "not a candidate, LinearPatch (the paper's): the fit linearpatch" in said
        assert "a channel is silent on the calibration text" in report
    assert ("LinearPatch (the paper's)" in quality) == (model == "dead")
    assert "dropped (no patch)" in quality


def test_a_fit_that_is_asked_for_and_cannot_be_made_is_refused(place: Path, tmp_path: Path) -> None:
    error = prune(place, "doubled", tmp_path / "out", "--fit", "linearpatch")
    assert isinstance(error, UnusableFit)
    assert not (tmp_path / "out").exists()


def test_a_sweep_leaves_out_what_cannot_be_made(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = place / "numbers.txt"
    more = ["--drop", "1-2", "-o", tmp_path / "out", "--text", text, *SMALL]
    assert linearpatch("sweep", place / "doubled", *more) is None
    points = json.loads(next((tmp_path / "out").rglob("sweep.json")).read_text())["points"]
    assert {point["fit"] for point in points} == {"none", "low-rank", "least-squares"}
    assert "layers dropped, linearpatch: the fit linearpatch" in " ".join(capsys.readouterr().err.split())
    assert linearpatch("inspect", tmp_path / "out") is None
    error = linearpatch("sweep", place / "doubled", *more[:3], tmp_path / "x", *more[4:], "--fits", "linearpatch")
    assert isinstance(error, InputError)
    assert "no fit could be made" in str(error)


def test_a_sweep_with_a_fit_that_is_there_at_some_depths_only() -> None:
    from linearpatch_kernels.cli.sweep import sweep_table

    points = [
        {"drop": 1, "fit": "none", "spans": ["2:3"], "perplexity": 2.0},
        {"drop": 2, "fit": "linearpatch", "spans": ["2:4"], "perplexity": None},
    ]
    table = sweep_table({"text": "t", "dense": {"perplexity": 1.0}, "points": points})
    columns, rows = table.columns, table.rows
    assert columns == ["dropped", "span", "none", "linearpatch"]
    assert rows == [["1", "2:3", "2", ""], ["2", "2:4", "", ""]]


# --- logits that are not finite --------------------------------------------------------------------------------------


def broken(at: float = math.nan) -> DensePatch:
    patch = DensePatch(48)
    with torch.no_grad():
        patch.weight[3, 4] = at
    return patch


@pytest.mark.parametrize("at", [math.nan, math.inf])
def test_a_candidate_that_is_not_finite_leaves_the_comparison(at: float) -> None:
    model, windows, told = tiny(), token_windows(3, 16), []
    candidates = {"broken": (Joint(Span(1, 2), broken(at)),), "none": (Joint(Span(1, 2)),)}
    found = compare_candidates(model, windows, candidates, noted=told.append)
    assert list(found) == ["dense", "none"]
    assert found["none"] == compare_candidates(model, windows, {"none": candidates["none"]})["none"]
    assert len(told) == 1
    assert told[0].startswith("left out of the comparison: broken gives logits that are not finite")


def test_a_model_that_is_not_finite_leaves_the_comparison_and_a_teacher_does_not() -> None:
    dense, windows, told = tiny(), token_windows(3, 16), []
    spoilt = tiny()
    with torch.no_grad():
        spoilt.lm_head.weight[5, 3] = math.inf
    found = compare_quality({"dense": dense, "spoilt": spoilt}, windows, dense, noted=told.append)
    assert list(found) == ["dense"]
    assert "spoilt" in told[0]
    with pytest.raises(InputError, match="the teacher gives logits that are not finite"):
        compare_quality({"other": dense, "spoilt": spoilt}, windows, spoilt, noted=told.append)


def test_auto_chooses_among_what_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny(), token_windows(4, 16)
    statistics = calibrate(model, [windows], moments=[Span(1, 3)])
    tried = fits_of(AUTO)
    for fit in tried:
        monkeypatch.setitem(FITS, fit.name, dataclasses.replace(fit, function=lambda *_: broken()))
    told: list[str] = []
    monkeypatch.setitem(FITS, "none", dataclasses.replace(FITS["none"], function=lambda *_: None))
    with pytest.raises(UnusableFit):
        fit_patch(statistics.at(Span(1, 3)), "scalar")
    choice = choose_fit(model, windows, statistics, [Span(1, 3)], rank=4, noted=told.append)
    assert choice.fit == "none"
    assert len(told) == len(tried) - 1


def test_plain_removal_that_is_not_finite_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 a stream that a patch holds may overflow without one."""
    found = {name: Quality(1.0, loss, None, None, None, 1) for name, loss in (("dense", 2.0), ("a", 2.5), ("b", 2.4))}
    joints = {name: (Joint(Span(1, 2), DensePatch(4), name),) for name in "ab"}
    assert selection.decide(joints, found).fit == "b"
    with pytest.raises(InputError, match="no fit gives a model whose logits are finite"):
        selection.decide({}, found)


def test_a_fit_without_a_solution_is_unusable() -> None:
    model, windows = tiny(), token_windows(4, 16)
    statistics = calibrate(model, [windows], moments=[Span(1, 3)])
    for value in (0.0, math.nan, math.inf):
        spoilt = torch.full((48, 48), value, dtype=torch.float64)
        moments = {Span(1, 3): Moments(spoilt, spoilt, 64.0)}
        for fit in ("low-rank", "least-squares", "hadamard-low-rank"):
            with pytest.raises(UnusableFit):
                fit_patch(statistics.with_moments(moments).at(Span(1, 3)), fit, rank=4)


def test_the_score_loss_passes_over_spans_that_cannot_be_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny(layers=8), token_windows(6, 16)
    free = plan_pruning(model, windows, windows[:2], drop=2, score="loss", fit="linearpatch", rank=4)
    best = free.plan.spans[0]
    real = FITS["linearpatch"]

    def unusable(joint: JointStatistics, rank: int) -> Any:
        if joint.name == str(best):
            raise UnusableFit(f"silent at {joint.name}")
        return real.function(joint, rank)

    monkeypatch.setitem(FITS, "linearpatch", dataclasses.replace(real, function=unusable))
    told: list[str] = []
    made = plan_pruning(model, windows, windows[:2], drop=2, score="loss", fit="linearpatch", rank=4, noted=told.append)
    assert made.plan.spans != [best]
    assert f"not a candidate: silent at {best}" in told


def test_merges_whose_logits_are_not_finite_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny(), token_windows(6, 16)
    settings = MergeSettings(layers=5, skip_score="loss", posterior=True)
    _, free = plan_merging(model, windows, windows[:2], settings)
    chosen = free.merges[0].span
    from linearpatch_kernels.healing import merge_search

    real = merge_search.merge_layers

    def spoiling(model: PreTrainedModel, merge: Any) -> PreTrainedModel:
        merged = real(model, merge)
        if merge.span == chosen:
            layer = merged.model.layers[merge.span.start].mlp.down_proj
            layer.weight = torch.nn.Parameter(torch.full_like(layer.weight, math.nan))
        return merged

    monkeypatch.setattr(merge_search, "merge_layers", spoiling)
    _, plan = plan_merging(model, windows, windows[:2], settings)
    assert plan.merges[0].span != chosen
    assert str(chosen) not in plan.records[0]["ranking"]
    json.dumps(plan.to_json(), allow_nan=False)


def test_shares_of_any_power() -> None:
    assert influence_shares([1.0, 2.0], 1e6) == [0.0, 1.0]
    assert influence_shares([0.0, 2.0], 3.0) == [0.0, 1.0]
    with pytest.raises(InputError, match="beyond all numbers"):
        influence_shares([0.0, 2.0], -1.0)


# --- worse than plain removal ----------------------------------------------------------------------------------------


def test_the_sentence_about_a_worse_result() -> None:
    found = {name: Quality(1.0, loss, None, None, None, 1) for name, loss in (("a", 2.0), ("b", 2.5))}
    assert told_if_worse(found, "a", "b", "4 windows") == []
    assert told_if_worse(found, "b", "b", "4 windows") == []
    assert told_if_worse(found, "a", "missing", "4 windows") == []
    assert told_if_worse(found, "b", "a", "4 windows of x") == [
        "On 4 windows of x the result is worse than plain removal: a loss of 2.5000 nats, not 2.0000."
    ]
    assert told_if_worse(found, "gone", "a", "4 windows")[0].endswith("the logits of the result are not finite.")


def told_last(out: str) -> str:
    """The lines behind the one that says where the result is."""
    return out.partition(" and report: ")[2].partition("\n")[2]


def worse(output: Path, row: str) -> bool:
    quality = json.loads(next(output.rglob("summary.json")).read_text())["quality"]
    return bool(quality[row]["loss"] > quality["dropped (no patch)"]["loss"])


def test_a_result_that_is_worse_than_plain_removal_says_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A map of more unknowns than tokens, on a model of random weights; seen with SmolLM2 and 128 tokens."""
    seen = {False: 0, True: 0}
    for seed, fit in ((0, "low-rank"), (0, "least-squares"), (0, "scalar"), (1, "low-rank"), (2, "scalar")):
        model, output = tmp_path / f"model{seed}", tmp_path / f"{fit}{seed}"
        if not model.exists():
            save_model(tiny(seed=seed), model)
        assert prune(model.parent, model.name, output, "--text", place / "numbers.txt", "--fit", fit) is None
        last = told_last(capsys.readouterr().out)
        is_worse = worse(output, f"healed ({fit})")
        seen[is_worse] += 1
        assert ("16 windows of unused parts of numbers.txt the result is worse than plain removal" in last) == is_worse
        assert ("--fit auto" in last) == is_worse
        report = next(output.rglob("report.md")).read_text()
        assert ("the result is worse than plain removal" in report) == is_worse
        load_model(output, device="cpu")
    assert min(seen.values()) >= 1, seen


@pytest.mark.parametrize("seed", range(3))
def test_auto_is_never_worse_where_it_chooses(tmp_path: Path, seed: int) -> None:
    model, windows = tiny(seed=seed), token_windows(6, 16, seed)
    made = plan_pruning(model, windows[:4], windows[4:], drop=2, rank=4, noted=lambda _: None)
    assert made.choice is not None
    found = made.choice.found
    assert found[made.choice.fit].loss <= found["none"].loss


def test_a_merge_is_refitted_unasked_only_where_that_helps(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def harmful(dense: PreTrainedModel, merged: PreTrainedModel, windows: Tensor, **_: Any) -> Refit:
        healed = keep_layers(merged, range(len(merged.get_decoder().layers)))
        healed.lm_head.weight = torch.nn.Parameter(20 * healed.lm_head.weight)  # sure of what is wrong
        return Refit(healed, [])

    monkeypatch.setattr(merges, "refit_merges", harmful)
    text = place / "numbers.txt"
    small = ["--layers", 4, "--text", text, "--samples", 4, "--length", 16, "--device", "cpu"]
    assert linearpatch("merge", place / "dense", "-o", tmp_path / "auto", *small) is None
    said = capsys.readouterr()
    assert "healing does not lower the loss on 4 held-out windows" in said.err
    assert "worse than without healing" not in told_last(said.out)
    assert linearpatch("merge", place / "dense", "-o", tmp_path / "none", *small, "--heal", "none") is None
    states = [load_model(tmp_path / name, device="cpu")[0].state_dict() for name in ("auto", "none")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    summary = json.loads(next((tmp_path / "auto").rglob("summary.json")).read_text())
    assert "heal" not in summary
    capsys.readouterr()
    assert linearpatch("merge", place / "dense", "-o", tmp_path / "asked", *small, "--heal", "refit") is None
    assert "the result is worse than without healing" in told_last(capsys.readouterr().out)


def test_a_patch_that_was_asked_for_and_cannot_be_made_keeps_the_merges(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = place / "numbers.txt"
    small = ["--layers", 4, "--text", text, "--samples", 4, "--length", 16, "--device", "cpu", "-o", tmp_path / "out"]
    error = linearpatch("merge", place / "doubled", *small, "--heal", "linearpatch")
    assert isinstance(error, InputError)
    assert "the same command with another --heal goes on" in str(error)
    assert linearpatch("merge", place / "doubled", *small, "--heal", "scalar") is None
    assert "going on from 1 merges" in capsys.readouterr().err


def test_distillation_says_whether_the_result_is_worse(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(place, "dense", tmp_path / "pruned", "--fit", "low-rank") is None
    capsys.readouterr()
    more = ["--teacher", place / "dense", "--text", place / "numbers.txt", "--steps", 2, "--length", 16, "--heldout", 2]
    for name, flags in (("plain", []), ("structured", ["--patch", "dense", "--structured", 0])):
        command = ["distill", tmp_path / "pruned", *more, "--device", "cpu", "--top-k", 5, *flags]
        assert linearpatch(*command, "-o", tmp_path / name) is None
        last = told_last(capsys.readouterr().out)
        row = "distilled, structured" if flags else "distilled"
        quality = json.loads(next((tmp_path / name).rglob("summary.json")).read_text())["quality"]
        for other, words in (("dropped (no patch)", "plain removal"), ("before distillation", "before distillation")):
            assert (f"worse than {words}" in last) == (quality[row]["loss"] > quality[other]["loss"])


@pytest.mark.parametrize("name", ["_quality_before", "_quality_after"])
def test_a_comparison_that_fails_costs_no_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Whatever fails in it, with the trained model in memory."""
    from linearpatch_kernels.evaluation import agreement

    real = agreement.compare_quality

    def failing(models: Any, *arguments: Any, **options: Any) -> Any:
        if ("dense" in models) == (name == "_quality_before"):
            raise RuntimeError("no memory for it")
        return real(models, *arguments, **options)

    assert prune(place, "dense", tmp_path / "pruned", "--fit", "linearpatch") is None
    monkeypatch.setattr(agreement, "compare_quality", failing)
    more = ["--teacher", place / "dense", "--text", place / "numbers.txt", "--steps", 2, "--length", 16, "--heldout", 2]
    capsys.readouterr()
    assert linearpatch("distill", tmp_path / "pruned", *more, "--device", "cpu", "-o", tmp_path / "out") is None
    assert "is left out: RuntimeError, no memory for it" in " ".join(capsys.readouterr().err.split())
    model, _ = load_model(tmp_path / "out", device="cpu")
    assert patches(model)
    assert "no memory for it" in next((tmp_path / "out").rglob("report.md")).read_text()


@pytest.mark.parametrize("command", ["prune", "merge"])
def test_a_comparison_that_fails_costs_no_cut(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from linearpatch_kernels.evaluation import agreement

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(selection, "compare_candidates", failing)
    monkeypatch.setattr(agreement, "compare_quality", failing)
    what = ["--drop", 2, "--fit", "scalar", *SMALL] if command == "prune" else ["--layers", 4, "--heal", "scalar"]
    small = [] if command == "prune" else ["--samples", 4, "--length", 16, "--device", "cpu"]
    output = ["-o", tmp_path / "out", "--text", place / "numbers.txt"]
    assert linearpatch(command, place / "dense", *what, *small, *output) is None
    load_model(tmp_path / "out", device="cpu")
    assert "no memory for it" in next((tmp_path / "out").rglob("report.md")).read_text()


# --- too little text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "windows", "enough"),
    [("low-rank", 12, 12), ("low-rank", 11, 12), ("shrunk-least-squares", 4, 12), ("linearpatch", 1, 0)],
)
def test_how_much_text_would_do(fit: str, windows: int, enough: int) -> None:
    told = too_little_text(["none", fit], 48, token_windows(windows, 16))
    assert (told is None) == (windows >= enough)
    assert told is None or f"{enough} windows would do" in told


@pytest.mark.parametrize(
    ("command", "before"),
    [
        (["prune", "--drop", 2, "--fit", "low-rank", "--rank", 4, "--samples", 4], "calibrating"),
        (["sweep", "--drop", "1-2", "--fits", "none,least-squares", "--samples", 4], "calibrating"),
        (["merge", "--layers", 4, "--heal", "low-rank", "--rank", 4, "--samples", 4], "choosing the place"),
        (["merge", "--layers", 4, "--heal", "refit", "--samples", 4], "choosing the place"),
    ],
    ids=["prune", "sweep", "merge-patch", "merge-refit"],
)
def test_too_little_text_is_told_before_the_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[Any], before: str
) -> None:
    text, output = place / "numbers.txt", tmp_path / "out"
    verb, *flags = command
    small = ["--text", text, "--length", 16, "--device", "cpu", "-o", output]
    assert linearpatch(verb, place / "dense", *flags, *small) is None
    said = " ".join(capsys.readouterr().err.split())
    note = re.search(r"note: 4 windows of 16 tokens are little text .*?(\d+) windows would do", said)
    assert note is not None, said
    assert note.start() < said.index(before)
    # As many as it says do.
    flags[flags.index("--samples") + 1] = int(note[1])
    assert linearpatch(verb, place / "dense", *flags, *small) is None
    assert "little text" not in capsys.readouterr().err


def test_usable_candidates_tell_of_the_others() -> None:
    model = silent("doubled")
    statistics = calibrate(model, [token_windows(4, 16)])
    told: list[str] = []
    found = usable_candidates(statistics, [Span(1, 3)], {"a": "none", "b": "linearpatch"}, noted=told.append)
    assert list(found) == ["a"]
    assert told[0].startswith("not a candidate, b: the fit linearpatch of 1:3")
    with pytest.raises(InputError, match="were not collected"):
        usable_candidates(statistics, [Span(1, 3)], {"a": "low-rank"}, rank=4)


def test_a_sweep_in_python_tells_what_it_leaves_out() -> None:
    told: list[str] = []
    windows = token_windows(4, 16)
    _, points, _ = sweep(silent("doubled"), windows, windows, [1, 2], ["none", "linearpatch"], noted=told.append)
    assert {point.fit for point in points} == {"none"}
    assert sum("linearpatch" in note for note in told) == 2
    with pytest.warns(UserWarning, match="not a candidate"):
        sweep(silent("doubled"), windows, windows, [1], ["none", "linearpatch"])


def test_patches_stay_where_the_merged_layers_are_healed_by_them(place: Path, tmp_path: Path) -> None:
    text = place / "numbers.txt"
    small = ["--layers", 4, "--text", text, "--samples", 12, "--length", 16, "--device", "cpu"]
    assert linearpatch("merge", place / "dense", "-o", tmp_path / "out", *small, "--heal", "scalar") is None
    assert patches(load_model(tmp_path / "out", device="cpu")[0])
