"""The main job on a real pretrained model: SmolLM2-135M, 6 of 30 layers dropped, 64 x 512 calibration tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Span, calibrate
from linearpatch_kernels.demo_data import demo_text
from linearpatch_kernels.evaluation.agreement import Quality, evaluate_quality, healed_share
from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.nn import HadamardPatch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import fit_patch
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.pruning.scores import choose_spans
from linearpatch_kernels.pruning.selection import FitChoice, choose_fit, compare_candidates, fitted_joints
from linearpatch_kernels.text import split_windows, token_windows

pytestmark = pytest.mark.demo

SPAN = Span(13, 19)


@dataclasses.dataclass(frozen=True)
class Study:
    """One calibration of the demo model; ``ratios``: per window, what the paper's formula makes of the same states."""

    model: PreTrainedModel
    statistics: CalibrationStatistics
    ratios: Tensor
    choice: FitChoice
    evaluation: Tensor


@pytest.fixture(scope="module")
def study(demo: tuple[PreTrainedModel, Any]) -> Study:
    model, tokenizer = demo
    windows = token_windows(tokenizer, demo_text("calibration"), length=512, count=66)
    shares = split_windows(windows, {"fit": 64, "heldout": 2})
    hadamard = hadamard_matrix(576)
    means: dict[int, list[Tensor]] = {SPAN.start: [], SPAN.end: []}

    def transcribe(depth: int) -> Any:
        def hook(_module: object, args: tuple[Tensor, ...]) -> None:
            means[depth].extend((args[0].double() @ hadamard).abs().mean(dim=1))

        return model.model.layers[depth].register_forward_pre_hook(hook)

    handles = [transcribe(depth) for depth in SPAN]
    statistics = calibrate(model, shares["fit"].split(4), moments=[SPAN])
    for handle in handles:
        handle.remove()
    ratios = torch.stack(means[SPAN.end]) / torch.stack(means[SPAN.start])
    # Half windows here and below: the calibration is what takes the time that a test may take.
    choice = choose_fit(model, shares["heldout"].reshape(4, 256)[::2], statistics, [SPAN])
    evaluation = token_windows(tokenizer, demo_text("heldout"), length=256, count=8)
    return Study(model, statistics, ratios, choice, evaluation)


@pytest.fixture(scope="module")
def found(study: Study) -> dict[str, Quality]:
    """On held-out LAMBADA passages."""
    candidates = {
        "dropped": fitted_joints(study.statistics, [SPAN], "none"),
        "LinearPatch": fitted_joints(study.statistics, [SPAN], "linearpatch"),
        "healed": study.choice.joints,
    }
    return compare_candidates(study.model, study.evaluation, candidates)


def test_the_span(study: Study) -> None:
    """The three scores of contiguous spans agree on it, with the rest of what is tested here resting on it."""
    assert study.statistics.samples == 64
    assert study.statistics.tokens == 64 * 512
    for score in ("cosine", "channel-cosine", "angular"):
        assert choose_spans(study.statistics, 6, score) == [SPAN]


def test_linearpatch_is_the_papers_formula(study: Study) -> None:
    assert study.ratios.shape == (64, 576)
    hadamard = hadamard_matrix(576)
    transcribed = hadamard @ torch.diag(study.ratios.mean(dim=0)) @ hadamard.T
    patch = fit_patch(study.statistics.at(SPAN), "linearpatch")
    assert isinstance(patch, HadamardPatch)
    torch.testing.assert_close(patch.to_dense(), transcribed, rtol=1e-5, atol=1e-5)
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(patch(x), x @ transcribed.float(), rtol=1e-5, atol=1e-5)


def test_healed_is_better_than_linearpatch_is_better_than_dropped(found: dict[str, Quality]) -> None:
    names = ["dense", "healed", "LinearPatch", "dropped"]
    perplexities = [found[name].perplexity for name in names]
    assert perplexities == sorted(perplexities)
    agreements = [found[name].top1_agreement for name in names]
    assert agreements == sorted(agreements, reverse=True)


def test_auto_heals_at_least_twice_as_much_as_linearpatch(found: dict[str, Quality]) -> None:
    healed, paper = (healed_share(found["dense"], found["dropped"], found[name]) for name in ("healed", "LinearPatch"))
    assert paper > 0
    assert healed >= 2 * paper


def test_the_healed_model_is_what_was_compared(study: Study, found: dict[str, Quality]) -> None:
    healed = apply_plan(study.model, PrunePlan(30, study.choice.joints))
    assert healed.config.num_hidden_layers == 24
    windows = study.evaluation[:2, :64]
    compared = compare_candidates(study.model, windows, {"healed": study.choice.joints})["healed"]
    assert evaluate_quality(healed, windows).loss == pytest.approx(compared.loss, rel=1e-5)
    assert study.choice.structured().fit not in ("least-squares", "shrunk-least-squares")
