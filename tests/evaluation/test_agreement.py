"""Quality against definitions in float64."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import (
    Quality,
    QualityMeter,
    compare_quality,
    evaluate_quality,
    healed_share,
    perplexity,
)
from linearpatch_kernels.evaluation.agreement import QualityMeters, token_agreement, token_kl
from linearpatch_kernels.processes import Processes


@torch.no_grad()
def defined_quality(student: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: Tensor) -> Quality:
    """The definitions over all windows at once."""
    log_q = student(windows).logits.double().log_softmax(-1)[:, :-1]
    log_p = teacher(windows).logits.double().log_softmax(-1)[:, :-1]
    losses = -log_q.gather(-1, windows[:, 1:, None]).squeeze(-1)
    return Quality(
        perplexity=losses.mean().exp().item(),
        loss=losses.mean().item(),
        loss_standard_error=losses.mean(1).std().item() / len(windows) ** 0.5,
        top1_agreement=(log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        tokens=losses.numel(),
    )


def assert_close(actual: Quality, expected: Quality) -> None:
    assert dataclasses.asdict(actual) == pytest.approx(dataclasses.asdict(expected), rel=2e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_quality_is_what_it_is_defined_as(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: Tensor, batch_size: int
) -> None:
    expected = defined_quality(student, teacher, windows)
    assert expected.kl is not None
    assert expected.kl > 1, "two models that differ"
    assert_close(evaluate_quality(student, windows, teacher, batch_size=batch_size), expected)


def test_agreement_counts_where_both_put_the_same_token_first(
    teacher: LlamaForCausalLM, windows: Tensor, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    torch.manual_seed(5)
    nearby = tiny_llama(2, layers=3)
    with torch.no_grad():
        for parameter in nearby.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    quality = evaluate_quality(nearby, windows, teacher)
    assert quality.top1_agreement is not None
    assert 0.2 < quality.top1_agreement < 0.98, "neither none nor all, so that a wrong count shows"
    assert_close(quality, defined_quality(nearby, teacher, windows))


def test_a_model_agrees_with_itself(
    teacher: LlamaForCausalLM, windows: Tensor, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    for other in (teacher, tiny_llama(2, layers=3)):
        quality = evaluate_quality(other, windows, teacher)
        assert (quality.top1_agreement, quality.kl) == (1.0, 0.0)
        assert quality.perplexity == perplexity(teacher, windows)


def test_without_a_teacher_nothing_is_said_about_it(student: LlamaForCausalLM, windows: Tensor) -> None:
    quality = evaluate_quality(student, windows)
    assert quality.top1_agreement is None
    assert quality.kl is None
    assert quality.perplexity == pytest.approx(perplexity(student, windows), rel=1e-12)
    assert json.loads(json.dumps(quality.to_dict()))["tokens"] == 7 * 18


def test_one_window_has_no_standard_error(student: LlamaForCausalLM, windows: Tensor) -> None:
    assert evaluate_quality(student, windows[:1]).loss_standard_error is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_token_kl_matches_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    logits, teacher = (4 * torch.randn(2, 9, 4001, generator=generator) for _ in range(2))
    logits, teacher = logits.to(dtype), teacher.to(dtype)
    log_p, log_q = teacher.double().log_softmax(-1), logits.double().log_softmax(-1)
    reference = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1]
    plain = F.kl_div(
        logits.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)[:, :-1]
    error = (token_kl(logits, teacher).double() - reference).abs().max()
    assert error <= 2 * (plain.double() - reference).abs().max() + 1e-6
    same = (logits.argmax(-1) == teacher.argmax(-1))[:, :-1]
    assert torch.equal(token_agreement(logits, teacher), same)


def test_the_teacher_runs_once_per_batch_for_all_models(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: Tensor
) -> None:
    calls = []
    handle = teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        qualities = compare_quality({"dense": teacher, "student": student}, windows, teacher, batch_size=2)
    finally:
        handle.remove()
    assert len(calls) == 4
    assert list(qualities) == ["dense", "student"]
    assert_close(qualities["student"], defined_quality(student, teacher, windows))
    assert qualities["dense"].kl == 0


def test_the_meter_adds_up_windows_of_different_lengths(student: LlamaForCausalLM, windows: Tensor) -> None:
    meter = QualityMeter()
    long, short = windows[:3], windows[3:, :6]
    losses = []
    for part in (long, short):
        with torch.no_grad():
            logits = student(part).logits
        meter.update(logits, part)
        losses.append(-logits.double().log_softmax(-1)[:, :-1].gather(-1, part[:, 1:, None]).flatten())
    assert meter.result().loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert meter.result().tokens == 3 * 18 + 4 * 5


def test_what_cannot_be_measured_is_refused(windows: Tensor) -> None:
    logits = torch.randn(7, 19, 89)
    with pytest.raises(InputError, match="no window was evaluated"):
        QualityMeter().result()
    with pytest.raises(InputError, match=r"the teacher's logits are .* they need one vocabulary"):
        QualityMeter().update(logits, windows, torch.randn(7, 19, 90))
    spoilt = logits.clone()
    spoilt[2, 4, 7] = math.nan
    with pytest.raises(InputError, match=r"the teacher gives logits that are not finite \(window 2, position 4\)"):
        QualityMeter().update(logits, windows, spoilt)
    with pytest.raises(InputError, match=r"patched gives logits that are not finite \(window 2, position 4\)"):
        QualityMeter("patched").update(spoilt, windows, logits)
    meter = QualityMeter()
    meter.update(logits, windows, logits)
    with pytest.raises(InputError, match="always or never"):
        meter.update(logits, windows)


def test_meters_of_several_processes_agree_on_who_is_left_out(windows: Tensor) -> None:
    """Each sees its own windows; a model that is not finite on those of one is left out by all."""
    logits = torch.randn(7, 19, 89)
    spoilt = logits.clone()
    spoilt[5, 2, 3] = math.inf
    halves = [QualityMeters(("a", "b"), lenient=True) for _ in range(2)]
    for meters, part in zip(halves, (slice(0, 4), slice(4, 7)), strict=True):
        meters.update("a", logits[part], windows[part], logits[part])
        meters.update("b", spoilt[part], windows[part], logits[part])
    assert [meters.names for meters in halves] == [["a", "b"], ["a"]]
    for both in (halves[0] + halves[1], pickle.loads(pickle.dumps(halves[1])) + halves[0]):
        told: list[str] = []
        assert list(both.results(told.append)) == ["a"]
        assert told == [told[0]]
        assert "b gives logits that are not finite (window 1, position 2)" in told[0]
    strict = QualityMeters(("a", "b"))
    with pytest.raises(InputError, match="b gives logits that are not finite"):
        strict.update("b", spoilt, windows)


def test_an_overflowing_perplexity_is_infinite() -> None:
    logits = torch.tensor([[[1e4, 0.0], [0.0, 0.0]]])
    meter = QualityMeter()
    meter.update(logits, torch.tensor([[0, 1]]))
    assert meter.result().loss == 1e4
    assert meter.result().perplexity == math.inf


def test_healed_share() -> None:
    dense, dropped, patched = (Quality(math.exp(x), x, None, None, None, 10) for x in (3.0, 5.0, 3.5))
    assert healed_share(dense, dropped, patched) == 0.75
    assert healed_share(dense, dropped, dropped) == 0
    assert math.isnan(healed_share(dense, dense, patched))
    assert math.isnan(healed_share(dropped, dense, patched)), "plain removal that is better costs nothing"


@pytest.mark.parametrize("count", [2, 9])
def test_processes_share_the_windows_and_get_the_whole(windows: Tensor, count: int) -> None:
    """Two processes run a part each; nine, of which some would have none of seven windows, run all."""
    table = torch.randn(90, 89, generator=torch.Generator().manual_seed(0))
    seen: list[list[int]] = [[] for _ in range(count)]
    given: list[object] = [None] * count
    together = threading.Barrier(count)
    found: dict[int, Quality] = {}

    def process(rank: int) -> None:
        def exchange(one: object) -> list[object]:
            given[rank] = one
            together.wait(60)
            return list(given)

        def model(batch: Tensor) -> Tensor:
            seen[rank].append(len(batch))
            return table[batch]

        processes = Processes(rank=rank, count=count, exchange=exchange)
        found[rank] = compare_quality({"it": model}, windows, processes=processes)["it"]

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    whole = compare_quality({"it": lambda batch: table[batch]}, windows)["it"]
    for rank in range(count):
        ours = found[rank]
        figures = (ours.loss, ours.loss_standard_error, ours.tokens)
        assert figures == pytest.approx((whole.loss, whole.loss_standard_error, whole.tokens), rel=1e-12)
    assert sorted(map(sum, seen)) == ([3, 4] if count == 2 else [7] * 9)
