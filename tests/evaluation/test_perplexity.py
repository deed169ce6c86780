"""Perplexity against its definition in float64."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import perplexity, token_losses
from linearpatch_kernels.evaluation.perplexity import over_predictions


@torch.no_grad()
def defined_perplexity(model: LlamaForCausalLM, windows: Tensor) -> float:
    """The definition: window by window, token by token."""
    negative_log_likelihoods = []
    for window in windows:
        probabilities = model(window[None]).logits[0].double().softmax(-1)
        negative_log_likelihoods += [-math.log(probabilities[t - 1, window[t]]) for t in range(1, len(window))]
    return math.exp(sum(negative_log_likelihoods) / len(negative_log_likelihoods))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_perplexity_is_what_it_is_defined_as(student: LlamaForCausalLM, windows: Tensor, batch_size: int) -> None:
    expected = defined_perplexity(student, windows)
    assert expected > 100, "a model that predicts something"
    assert perplexity(student, windows, batch_size=batch_size) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 5), (3, 17, 101), (2, 5, 33333)], ids=str)
def test_token_losses_match_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (6 * torch.randn(shape, generator=generator)).to(dtype)
    windows = torch.randint(shape[2], shape[:2], generator=generator)
    losses = token_losses(logits, windows)
    reference = -logits.double().log_softmax(-1)[:, :-1].gather(-1, windows[:, 1:, None]).squeeze(-1)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = F.cross_entropy(logits.float()[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")
    plain_error = (plain.double() - reference).abs().max()
    assert (losses.double() - reference).abs().max() <= 2 * plain_error + 1e-6


def test_token_losses_of_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[[3e4, -3e4, 0.0], [0.0, 0.0, 0.0]]])
    assert token_losses(logits, torch.tensor([[0, 1]])).tolist() == [[6e4]]
    assert token_losses(logits, torch.tensor([[0, 0]])).tolist() == [[0.0]]


def test_predictions_come_in_bounded_chunks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[over_predictions.__module__], "_CHUNK_ELEMENTS", 50)
    logits = torch.arange(2 * 9 * 11, dtype=torch.float32).reshape(2, 9, 11)
    sizes = []

    def first(rows: Tensor, index: tuple[int, slice]) -> Tensor:
        sizes.append(rows.numel())
        assert torch.equal(rows, logits[index])
        return rows[:, 0]

    assert torch.equal(over_predictions(first, logits), logits[:, :-1, 0])
    assert max(sizes) <= 50
    assert len(sizes) == 4


def test_any_callable_is_a_model(student: LlamaForCausalLM, windows: Tensor) -> None:
    expected = perplexity(student, windows)
    assert perplexity(lambda ids: student(ids).logits, windows) == pytest.approx(expected, rel=1e-6)
    assert perplexity(lambda ids: student(ids), windows) == pytest.approx(expected, rel=1e-6)


def test_the_model_is_left_in_its_mode_without_gradients(windows: Tensor) -> None:
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(89, 89))
            self.modes: list[tuple[bool, bool]] = []

        def forward(self, ids: Tensor) -> Tensor:
            self.modes.append((self.training, torch.is_grad_enabled()))
            return self.weight[ids]

    model = Recording().train()
    perplexity(model, windows)
    assert set(model.modes) == {(False, False)}
    assert model.training
    perplexity(model.eval(), windows)
    assert not model.training


def test_progress_is_reported(student: LlamaForCausalLM, windows: Tensor) -> None:
    reports: list[tuple[str, int, int]] = []
    perplexity(student, windows, batch_size=3, progress=lambda *report: reports.append(report))
    assert reports == [("perplexity", 3, 7), ("perplexity", 6, 7), ("perplexity", 7, 7)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_named(windows: Tensor, bad: float) -> None:
    def model(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 89)
        if torch.equal(ids[0], windows[4]):
            logits[0, 5] = bad
        return logits

    with pytest.raises(InputError, match=r"the model gives logits that are not finite \(window 4, position 5\)"):
        perplexity(model, windows)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 65, dtype=torch.long), "65 tokens exceed the model's 64 positions"),
        (torch.full((1, 4), 89), "token id 89 but the model's vocabulary ends at 88"),
        (torch.zeros(2, 1, dtype=torch.long), "length >= 2"),
        (torch.zeros(0, 5, dtype=torch.long), "count >= 1"),
        (torch.zeros(5, dtype=torch.long), "must be token ids"),
        (torch.zeros(2, 5), "must be token ids"),
        (torch.zeros(2, 5, dtype=torch.bool), "must be token ids"),
        (torch.zeros(2, 5, dtype=torch.complex64), "must be token ids"),
        (torch.tensor([[3, -1, 4]]), "-1 is none"),
        ([[1, 2, 3]], "must be a tensor of token ids"),
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused(student: LlamaForCausalLM, ids: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        perplexity(student, ids)


def test_an_empty_batch_is_refused(student: LlamaForCausalLM, windows: Tensor) -> None:
    with pytest.raises(InputError, match="batch size must be a number from 1"):
        perplexity(student, windows, batch_size=0)
