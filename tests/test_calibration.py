"""Statistics against a few lines of float64 on hooked states; one pass, bounded memory, bad input."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearpatch_kernels import calibration
from linearpatch_kernels.calibration import (
    CalibrationStatistics,
    Moments,
    Span,
    block_influence,
    calibrate,
    collect_moments,
    joint_statistics,
)
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import residual_stream
from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.torch_state import faster_float32_products
from tests.support.tiny import VOCABULARY, tiny_model, tiny_patched_model

LAYERS, WIDTH = 6, 48
SPANS = [Span(2, 4), Span(1, 6), Span(0, 2)]
Definition = Callable[[Tensor], Tensor]


def model_with_a_sink(**changes: int) -> PreTrainedModel:
    """Token 1, with which the windows start, enters with a norm hundreds of times that of the others."""
    model = tiny_model("llama", max_position_embeddings=1024, **changes)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] *= 300
    return model


def token_windows(count: int, length: int, seed: int = 0) -> Tensor:
    windows = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    windows[:, 0] = 1
    return windows


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_with_a_sink()


# 300: a chunk of 256 tokens and a rest.
@pytest.fixture(scope="module", params=[2, 37, 256, 257, 300], ids="{}-tokens".format)
def windows(request: pytest.FixtureRequest) -> Tensor:
    return token_windows(3, request.param)


@pytest.fixture(scope="module")
def statistics(model: PreTrainedModel, windows: Tensor) -> CalibrationStatistics:
    return calibrate(model, windows.split(2), moments=SPANS, normed=True)


@pytest.fixture(scope="module")
def states(
    model: PreTrainedModel, windows: Tensor, hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]
) -> Tensor:
    """[W, T, L+1, d], float64, of the same batches; the model's own products are made as calibration has them made."""
    with faster_float32_products():
        return torch.cat([hooked_states(model, batch) for batch in windows.split(2)])


def assert_as_defined(actual: Tensor, definition: Definition, states: Tensor, atol: float) -> None:
    """The error is at most twice that of the definition computed in float32, plus ``atol``."""
    expected = definition(states)
    plain = definition(states.float()).double()
    assert actual.shape == expected.shape
    allowed = 2 * (plain - expected).abs().max().item() + atol
    assert (actual.double() - expected).abs().max().item() <= allowed


def over_pairs(depths: int, function: Callable[[int, int], Tensor]) -> Tensor:
    return torch.stack([torch.stack([function(i, j) for j in range(depths)]) for i in range(depths)])


def token_cosines(states: Tensor) -> Tensor:
    """[L+1, L+1, W, T]."""
    return over_pairs(
        states.shape[2], lambda i, j: F.cosine_similarity(states[:, :, i], states[:, :, j], dim=-1).clamp(-1, 1)
    )


def mean_token_cosine(states: Tensor) -> Tensor:
    return token_cosines(states).mean(dim=(-1, -2))


def mean_last_token_angle(states: Tensor) -> Tensor:
    angle = token_cosines(states[:, -1:]).arccos().mean(dim=(-1, -2)) / torch.pi
    # Of a state with itself: rounding alone, and arccos makes much of it.
    return angle.fill_diagonal_(0)


def mean_channel_cosine(states: Tensor) -> Tensor:
    """The authors' call: `cosine_similarity` of two [1, T, d] tensors, `dim` left at its default, which is 1."""
    samples = states.split(1)
    return over_pairs(
        states.shape[2],
        lambda i, j: torch.stack([F.cosine_similarity(x[:, :, i], x[:, :, j]).mean() for x in samples]).mean(),
    )


def mean_abs(states: Tensor) -> Tensor:
    return states.abs().mean(dim=1)


def hadamard_mean_abs(states: Tensor) -> Tensor:
    return (states @ hadamard_matrix(states.shape[-1], dtype=states.dtype)).abs().mean(dim=1)


def test_token_cosines(statistics: CalibrationStatistics, states: Tensor) -> None:
    assert_as_defined(statistics.mean_token_cosine(), mean_token_cosine, states, atol=1e-6)


def test_last_token_angles(statistics: CalibrationStatistics, states: Tensor) -> None:
    actual = statistics.mean_last_token_angle()
    assert actual.diagonal().max() < 1e-3
    assert_as_defined(actual.clone().fill_diagonal_(0), mean_last_token_angle, states, atol=2e-6)


def test_channel_cosines(statistics: CalibrationStatistics, states: Tensor) -> None:
    assert_as_defined(statistics.mean_channel_cosine(), mean_channel_cosine, states, atol=1e-6)


def test_block_influence(statistics: CalibrationStatistics, states: Tensor) -> None:
    def definition(states: Tensor) -> Tensor:
        cosines = [
            F.cosine_similarity(states[:, :, i], states[:, :, i + 1], dim=-1).mean() for i in range(states.shape[2] - 1)
        ]
        return 1 - torch.stack(cosines)

    assert_as_defined(statistics.block_influence(), definition, states, atol=1e-6)


def test_clamped_block_influence_is_a_right_angle_at_most() -> None:
    cosine = torch.tensor([1.0, 0.25, -0.5])
    assert block_influence(cosine).tolist() == [0, 0.75, 1.5]
    assert block_influence(cosine, clamped=True).tolist() == [0, 0.75, 1]


@pytest.mark.parametrize(
    ("name", "definition"),
    [("mean_abs", mean_abs), ("hadamard_mean_abs", hadamard_mean_abs)],
    ids=["plain", "hadamard"],
)
def test_mean_magnitudes_of_every_window(
    statistics: CalibrationStatistics, states: Tensor, name: str, definition: Definition
) -> None:
    # Relative to each window's largest channel: with the sink in it, the mean is hundreds of times the one without.
    unit = definition(states).amax(dim=(1, 2), keepdim=True)
    actual = getattr(statistics, name).double() / unit
    assert_as_defined(actual, lambda states: definition(states) / unit.to(states.dtype), states, atol=1e-6)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_what_is_known_of_a_joint(statistics: CalibrationStatistics, span: Span) -> None:
    joint = statistics.at(span)
    assert (joint.name, joint.width) == (str(span), WIDTH)
    assert torch.equal(joint.mean_abs_before, statistics.mean_abs[:, span.start])
    assert torch.equal(joint.mean_abs_after, statistics.mean_abs[:, span.end])
    assert torch.equal(joint.hadamard_mean_abs_before, statistics.hadamard_mean_abs[:, span.start])
    assert torch.equal(joint.hadamard_mean_abs_after, statistics.hadamard_mean_abs[:, span.end])
    assert joint.collected_moments() is statistics.moments[span]


def test_a_joint_without_moments_and_one_outside_the_model(statistics: CalibrationStatistics) -> None:
    with pytest.raises(InputError, match="the second moments of 3:5 were not collected"):
        statistics.at(Span(3, 5)).collected_moments()
    with pytest.raises(InputError, match="the span 3:7 does not lie in the model's 6 layers"):
        statistics.at(Span(3, 7))


def test_a_joint_without_moments_of_the_normed_stream(model: PreTrainedModel) -> None:
    joint = calibrate(model, [token_windows(1, 5)], moments=[Span(2, 4)]).at(Span(2, 4))
    assert joint.collected_moments().normed is None
    with pytest.raises(InputError, match="of the normed stream of 2:4 were not collected: calibrate with normed=True"):
        joint.collected_normed_moments()


@pytest.mark.parametrize("tokens", [37, 300])
def test_a_joint_between_two_streams_is_what_calibration_sees(model: PreTrainedModel, tokens: int) -> None:
    windows, span = token_windows(3, tokens), Span(2, 4)
    expected = calibrate(model, windows.split(1), moments=[span], normed=True).at(span)
    with torch.no_grad(), faster_float32_products():
        streams = [residual_stream(model, window, list(span)) for window in windows.split(1)]
    eps = model.config.rms_norm_eps
    found = joint_statistics(((states[2][0], states[4][0]) for states in streams), "here", eps=eps)
    assert found.name == "here"
    for name in ("mean_abs_before", "mean_abs_after", "hadamard_mean_abs_before", "hadamard_mean_abs_after"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    ours, its = found.collected_moments(), expected.collected_moments()
    normed, its_normed = found.collected_normed_moments(), expected.collected_normed_moments()
    assert normed.eps == its_normed.eps == eps
    pairs = [(ours.xx, its.xx), (ours.xy, its.xy), (normed.nn, its_normed.nn), (normed.nr, its_normed.nr)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())
    assert ours.yy == its.yy


def test_a_joint_without_text_and_with_values_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="no calibration text"):
        joint_statistics([], "here")
    with pytest.raises(InputError, match="NaN or an infinity"):
        joint_statistics([(torch.ones(3, 4), torch.full((3, 4), torch.nan))], "here")


def test_an_odd_width_whose_transform_is_the_identity() -> None:
    states = torch.randn(5, 3, 7)
    sums = calibration._Sums(layers=2, width=7, spans=[])
    sums.add(states.unbind(1))
    whole = states[None].double()
    told = sums.statistics()
    torch.testing.assert_close(told.channel_cosine, mean_channel_cosine(whole), rtol=0, atol=1e-6)
    torch.testing.assert_close(told.hadamard_mean_abs, mean_abs(whole).float())


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_moments_weigh_every_token_the_same(statistics: CalibrationStatistics, states: Tensor, span: Span) -> None:
    def products(states: Tensor, other: int) -> Tensor:
        rows = states.flatten(0, 1)
        weight = rows[:, span.end].square().sum(dim=-1, keepdim=True).reciprocal()
        return (weight * rows[:, span.start]).mT @ rows[:, other]

    moments = statistics.moments[span]
    assert moments.xx.dtype == moments.xy.dtype == torch.float64
    for actual, other in ((moments.xx, span.start), (moments.xy, span.end)):
        definition = partial(products, other=other)
        assert_as_defined(actual, definition, states, atol=1e-6 * actual.abs().max().item())
    assert moments.yy == pytest.approx(states.shape[0] * states.shape[1])


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_moments_of_the_normed_stream(statistics: CalibrationStatistics, states: Tensor, span: Span) -> None:
    normed = statistics.at(span).collected_normed_moments()
    assert normed.eps == 1e-6, "what a Llama config has by default"

    def products(states: Tensor, gained: bool) -> Tensor:
        before, after = states[:, :, span.start].flatten(0, 1), states[:, :, span.end].flatten(0, 1)
        weight = after.square().sum(dim=-1, keepdim=True).reciprocal()
        rows = before / (before.square().mean(dim=-1, keepdim=True) + normed.eps).sqrt()
        return (weight * rows).mT @ (after - before if gained else rows)

    for actual, gained in ((normed.nn, False), (normed.nr, True)):
        assert actual.dtype == torch.float64
        assert_as_defined(actual, partial(products, gained=gained), states, atol=1e-6 * actual.abs().max().item())


def test_asking_for_the_normed_stream_changes_no_other_bit(model: PreTrainedModel) -> None:
    windows = token_windows(3, 21)
    without, beside = (calibrate(model, [windows], moments=SPANS, normed=normed) for normed in (False, True))
    for span in SPANS:
        assert without.moments[span].normed is None
        assert beside.moments[span].normed is not None
        assert torch.equal(without.moments[span].xx, beside.moments[span].xx)
        assert torch.equal(without.moments[span].xy, beside.moments[span].xy)


def test_a_model_without_the_eps_of_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_a_sink()
    # The default lies in the class.
    monkeypatch.delattr(type(model.config), "rms_norm_eps")
    del model.config.rms_norm_eps
    with pytest.raises(InputError, match=r"config has no rms_norm_eps.*give another fit"):
        calibrate(model, [token_windows(1, 5)], moments=SPANS, normed=True)


def test_counts(statistics: CalibrationStatistics, windows: Tensor) -> None:
    count, length = windows.shape
    assert statistics.samples == count
    assert statistics.tokens == count * length
    assert (statistics.num_layers, statistics.width) == (LAYERS, WIDTH)


def assert_same(actual: CalibrationStatistics, expected: CalibrationStatistics, rtol: float) -> None:
    assert actual.samples == expected.samples
    assert actual.tokens == expected.tokens
    for name in ("token_cosine", "channel_cosine", "mean_abs", "hadamard_mean_abs"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=rtol, atol=rtol)
    # The rounding of a cosine near 1 is large in its arccos.
    size = expected.last_token_angle.abs().max().item()
    torch.testing.assert_close(actual.last_token_angle, expected.last_token_angle, rtol=0, atol=1e-3 * size)
    assert actual.moments.keys() == expected.moments.keys()
    for span, moments in expected.moments.items():
        size = moments.xx.abs().max().item() + moments.xy.abs().max().item()
        for name in ("xx", "xy"):
            ours = getattr(actual.moments[span], name)
            torch.testing.assert_close(ours, getattr(moments, name), rtol=rtol, atol=rtol * size)
        assert actual.moments[span].yy == moments.yy
        assert (actual.moments[span].normed is None) == (moments.normed is None)
        if moments.normed is not None:
            found, wanted = actual.at(span).collected_normed_moments(), moments.normed
            assert found.eps == wanted.eps
            size = wanted.nn.abs().max().item() + wanted.nr.abs().max().item()
            torch.testing.assert_close(found.nn, wanted.nn, rtol=rtol, atol=rtol * size)
            torch.testing.assert_close(found.nr, wanted.nr, rtol=rtol, atol=rtol * size)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_changes_nothing(model: PreTrainedModel, batch_size: int) -> None:
    windows = token_windows(7, 21)
    expected = calibrate(model, windows.split(3), moments=SPANS, normed=True)
    assert_same(calibrate(model, windows.split(batch_size), moments=SPANS, normed=True), expected, rtol=2e-5)


def test_statistics_add_up(model: PreTrainedModel) -> None:
    windows = token_windows(5, 30)
    whole = calibrate(model, windows.split(1), moments=SPANS, normed=True)
    parts = [calibrate(model, part.split(1), moments=SPANS, normed=True) for part in (windows[:2], windows[2:])]
    assert_same(parts[0] + parts[1], whole, rtol=1e-12)
    assert torch.equal((parts[0] + parts[1]).mean_abs, whole.mean_abs), "the windows stay in order"


def test_windows_of_different_lengths_and_one_shot_iterators(
    model: PreTrainedModel, hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]
) -> None:
    short, long = token_windows(2, 9), token_windows(1, 40, seed=1)
    mapped = {"input_ids": long, "attention_mask": torch.ones_like(long)}
    empty = torch.empty(0, 5, dtype=torch.int64)
    found = calibrate(model, iter([short, empty, mapped]))
    assert found.samples == 3
    assert found.tokens == 58
    cosines = [token_cosines(hooked_states(model, windows)).sum(dim=(-1, -2)) for windows in (short, long)]
    torch.testing.assert_close(found.token_cosine, cosines[0] + cosines[1], rtol=1e-5, atol=1e-5)
    assert_same(found, calibrate(model, [short]) + calibrate(model, [long]), rtol=1e-12)


def test_statistics_that_do_not_belong_together_do_not_add(model: PreTrainedModel) -> None:
    windows = token_windows(1, 5)
    plain = calibrate(model, [windows])
    with pytest.raises(InputError, match="same spans"):
        plain + calibrate(model, [windows], moments=SPANS)
    with pytest.raises(InputError, match="different models"):
        plain + calibrate(model_with_a_sink(layers=4), [windows])
    beside = calibrate(model, [windows], moments=SPANS, normed=True)
    with pytest.raises(InputError, match="only one of the statistics has moments of the normed stream"):
        beside + calibrate(model, [windows], moments=SPANS)
    other = model_with_a_sink(rms_norm_eps=1e-3)
    with pytest.raises(InputError, match=r"an eps of 1e-06 and of 0\.001 cannot be added"):
        beside + calibrate(other, [windows], moments=SPANS, normed=True)


def test_moments_of_a_second_pass_are_those_of_the_first(model: PreTrainedModel) -> None:
    windows = token_windows(4, 300)
    for normed in (False, True):
        first = calibrate(model, windows.split(2), moments=SPANS, normed=normed)
        found = collect_moments(model, windows.split(2), SPANS, normed=normed)
        assert_same(calibrate(model, windows.split(2)).with_moments(found), first, rtol=1e-6)
    assert collect_moments(model, windows.split(2), []) == {}


def test_every_layer_runs_once(model: PreTrainedModel, count_calls: Callable[..., list[int]]) -> None:
    calls = count_calls(model.model.layers)
    calibrate(model, token_windows(5, 10).split(2), moments=SPANS)
    assert calls == [5] * LAYERS


def test_a_second_pass_ends_where_its_last_span_does(
    model: PreTrainedModel, count_calls: Callable[..., list[int]]
) -> None:
    calls = count_calls(model.model.layers)
    collect_moments(model, token_windows(5, 10).split(2), [Span(1, 2), Span(2, 4)])
    assert calls == [5, 5, 5, 5, 0, 0]


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_other_families(family: str, hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]) -> None:
    model = tiny_model(family)
    windows = token_windows(2, 30)
    found, states = calibrate(model, [windows]), hooked_states(model, windows)
    assert_as_defined(found.mean_token_cosine(), mean_token_cosine, states, atol=1e-6)
    assert_as_defined(found.mean_abs, mean_abs, states, atol=1e-5)


def test_a_patched_model(hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]) -> None:
    """Its depths are the inputs of its layers, before their patches, and the output behind the last patch."""
    model = tiny_patched_model("llama")
    windows = token_windows(2, 30)
    found, states = calibrate(model, [windows], moments=[Span(1, 3)]), hooked_states(model, windows)
    assert found.num_layers == 4
    assert_as_defined(found.mean_token_cosine(), mean_token_cosine, states, atol=1e-6)
    assert_as_defined(found.hadamard_mean_abs, hadamard_mean_abs, states, atol=1e-5)


def test_low_precision_models(hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]) -> None:
    model = model_with_a_sink().to(torch.bfloat16)
    windows = token_windows(2, 30)
    found, states = calibrate(model, [windows]), hooked_states(model, windows)
    assert_as_defined(found.mean_token_cosine(), mean_token_cosine, states, atol=1e-6)
    assert_as_defined(found.mean_channel_cosine(), mean_channel_cosine, states, atol=1e-6)
    assert found.mean_abs.dtype == torch.float32


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = model_with_a_sink()
    windows = token_windows(3, 12)
    expected = calibrate(model, [windows], moments=SPANS)
    moments = collect_moments(model, [windows], SPANS)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert_same(calibrate(model, [windows], moments=SPANS), expected, rtol=1e-6)
    again = collect_moments(model, [windows], SPANS)
    assert all(torch.equal(again[span].xx, moments[span].xx) for span in SPANS)
    assert model.training


def test_the_model_stays_as_it_is_and_trains_on() -> None:
    model = model_with_a_sink()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = calibrate(model, [token_windows(2, 12)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(hooks for layer in model.model.layers for hooks in (layer._forward_pre_hooks, layer._forward_hooks))
    scale = torch.ones(WIDTH, requires_grad=True)
    (scale * found.mean_abs).sum().backward()
    model(input_ids=token_windows(1, 5)).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_progress(model: PreTrainedModel) -> None:
    seen: list[tuple[str, int, int]] = []
    batches = token_windows(5, 6).split(2)
    calibrate(model, batches, progress=lambda *report: seen.append(report))
    collect_moments(model, iter(batches), SPANS, progress=lambda *report: seen.append(report))
    assert [(done, total) for _, done, total in seen] == [(2, 5), (4, 5), (5, 5), (2, 0), (4, 0), (5, 0)]


@pytest.mark.parametrize("depths", [[0], [6], [2, 5], [0, 3, 6]], ids=str)
def test_residual_stream(
    model: PreTrainedModel, depths: list[int], hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]
) -> None:
    windows = token_windows(2, 11)
    with torch.no_grad():
        found = residual_stream(model, windows, depths)
    states = hooked_states(model, windows)
    assert sorted(found) == depths
    for depth in depths:
        assert torch.equal(found[depth].double(), states[:, :, depth])


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator had handed out during the call, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def forward_bytes(model: PreTrainedModel, windows: Tensor) -> int:
    with torch.no_grad():
        return peak_bytes(lambda: model.model(input_ids=windows, use_cache=False))


def documented_bytes(model: PreTrainedModel, batch: Tensor, samples: int, moments: int, normed: bool) -> int:
    """The formula in the docstrings of `calibrate` and of `CalibrationStatistics`."""
    (windows, tokens), depths, width = batch.shape, model.config.num_hidden_layers + 1, model.config.hidden_size
    chunk = min(tokens, 256)
    residual_stream = 4 * windows * tokens * depths * width
    working = 4 * (chunk * depths * (3 * width + 2 * depths) + 2 * width * depths**2 + 10 * width * depths)
    if moments:
        working += 4 * (4 * tokens * width + 3 * width**2)
    means = 8 * samples * depths * width
    statistics = 2 * means + 24 * depths**2 + (32 if normed else 16) * moments * width**2
    return residual_stream + max(working, forward_bytes(model, batch)) + statistics


@pytest.mark.parametrize(
    ("windows", "tokens", "layers", "moments", "normed"),
    [
        (1, 900, 6, 0, False),
        (4, 300, 6, 0, False),
        (1, 20, 14, 0, False),
        (8, 2, 6, 0, False),
        (2, 400, 4, 3, False),
        (2, 400, 4, 3, True),
    ],
    ids=["long", "batched", "deep", "short", "with-moments", "with-normed-moments"],
)
def test_memory_stays_within_the_documented_formula(
    windows: int, tokens: int, layers: int, moments: int, normed: bool
) -> None:
    model = model_with_a_sink(layers=layers, intermediate_size=16)
    batches = [token_windows(windows, tokens, seed) for seed in range(2)]
    spans = [Span(1, 2 + i) for i in range(moments)]
    calibrate(model, batches, moments=spans, normed=normed)
    documented = documented_bytes(model, batches[0], 2 * windows, moments, normed)
    peak = peak_bytes(lambda: calibrate(model, batches, moments=spans, normed=normed))
    assert documented / 3 < peak <= documented


def test_more_batches_take_no_more_memory_but_for_the_means_of_their_windows() -> None:
    model = model_with_a_sink(intermediate_size=16)
    batches = [token_windows(1, 300, seed) for seed in range(9)]
    calibrate(model, batches)
    few, many = (peak_bytes(lambda n=n: calibrate(model, batches[:n])) for n in (2, 9))
    means = 8 * (LAYERS + 1) * WIDTH
    assert many - few <= 2 * 7 * means + 4096


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_layer_that_gives_what_is_not_finite_is_named(layer: int, bad: float) -> None:
    model = model_with_a_sink()
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[5, 3] = bad
    with pytest.raises(InputError, match=f"the output of layer {layer} holds a NaN or an infinity") as caught:
        calibrate(model, [token_windows(2, 10)])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"the output of layer {layer} "):
        collect_moments(model, [token_windows(2, 10)], [Span(layer, layer + 1)])


def test_an_embedding_that_is_not_finite_is_named() -> None:
    model = model_with_a_sink()
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 3] = torch.nan
    windows = token_windows(2, 10)
    windows[1, 4] = 7
    with pytest.raises(InputError, match="the token embedding holds a NaN or an infinity"):
        calibrate(model, [windows])


def padded() -> Tensor:
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, :3] = 0
    return mask


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there is no calibration text"),
        ([torch.empty(0, 8, dtype=torch.int64)], "there is no calibration text"),
        ([token_windows(2, 1)], "T >= 2"),
        ([torch.arange(3, 9)], "T >= 2"),
        (token_windows(2, 8), "windows.split"),
        ({"input_ids": token_windows(2, 8)}, "windows.split"),
        ([{"input_ids": token_windows(2, 10), "attention_mask": padded()}], "must not be padded"),
        ([token_windows(2, 8) + VOCABULARY], "vocabulary"),
        ([token_windows(1, 2000)], "positions"),
        ([torch.rand(2, 8)], "token ids"),
    ],
    ids=[
        "none",
        "empty",
        "one-token",
        "no-batch",
        "one-tensor",
        "one-mapping",
        "padded",
        "foreign-ids",
        "too-long",
        "floats",
    ],
)
def test_bad_batches(model: PreTrainedModel, batches: object, message: str) -> None:
    for run in (lambda: calibrate(model, batches), lambda: collect_moments(model, batches, SPANS)):
        with pytest.raises(InputError, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("span", [Span(3, 3), Span(4, 2), Span(-1, 2), Span(2, 7)], ids=str)
def test_moments_of_spans_that_are_not_there(
    model: PreTrainedModel, span: Span, count_calls: Callable[..., list[int]]
) -> None:
    calls = count_calls(model.model.layers)
    for run in (calibrate, collect_moments):
        with pytest.raises(InputError, match=f"the span {span} does not lie in the model's 6 layers"):
            run(model, [token_windows(1, 5)], moments=[span]) if run is calibrate else run(
                model, [token_windows(1, 5)], [span]
            )
    assert calls == [0] * LAYERS


@pytest.mark.parametrize("text", ["", "3", "3:", ":4", "a:b", "3-5", "1:2:3", "-1:4", "1.5:3"])
def test_a_span_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match="write START:END"):
        Span.parse(text)


@pytest.mark.parametrize("text", ["5:5", "19:13"])
def test_an_empty_or_reversed_span(text: str) -> None:
    with pytest.raises(InputError, match="empty or reversed"):
        Span.parse(text)


def test_spans_are_read_as_they_are_written() -> None:
    assert Span.parse(" 13:19 ") == Span(13, 19)
    assert str(Span(13, 19)) == "13:19"
    assert Span(13, 19).length == 6


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model: PreTrainedModel, tmp_path: Path) -> Iterator[tuple[Path, CalibrationStatistics]]:
    statistics = calibrate(model, token_windows(3, 12).split(2), moments=SPANS)
    # Of one span those of the normed stream as well, as a sweep that went on with another fit has it.
    statistics = statistics.with_moments(collect_moments(model, [token_windows(3, 12)], SPANS[:1], normed=True))
    path = tmp_path / "statistics.safetensors"
    statistics.save(path, fingerprint="model and text")
    return path, statistics


def test_what_was_saved_is_loaded_bit_for_bit(saved: tuple[Path, CalibrationStatistics]) -> None:
    path, statistics = saved
    loaded = CalibrationStatistics.load(path, fingerprint="model and text")
    assert loaded.samples == statistics.samples
    assert loaded.tokens == statistics.tokens
    for name in ("token_cosine", "last_token_angle", "channel_cosine", "mean_abs"):
        assert torch.equal(getattr(loaded, name), getattr(statistics, name))
        assert getattr(loaded, name).dtype == getattr(statistics, name).dtype
    assert torch.equal(loaded.hadamard_mean_abs, statistics.hadamard_mean_abs)
    assert loaded.moments.keys() == statistics.moments.keys()
    for span, moments in statistics.moments.items():
        assert isinstance(loaded.moments[span], Moments)
        assert torch.equal(loaded.moments[span].xx, moments.xx)
        assert torch.equal(loaded.moments[span].xy, moments.xy)
        assert loaded.moments[span].yy == moments.yy
        assert (loaded.moments[span].normed is None) == (moments.normed is None) == (span != SPANS[0])
    found, normed = (one.at(SPANS[0]).collected_normed_moments() for one in (loaded, statistics))
    assert torch.equal(found.nn, normed.nn)
    assert torch.equal(found.nr, normed.nr)
    assert found.eps == normed.eps
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written stays"


def refuse(path: Path, message: str, fingerprint: str = "model and text") -> None:
    with pytest.raises(InputError, match=message) as caught:
        CalibrationStatistics.load(path, fingerprint=fingerprint)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_statistics_of_another_model_or_text_are_refused(saved: tuple[Path, CalibrationStatistics]) -> None:
    refuse(saved[0], "another model or text", fingerprint="other")


def test_a_file_that_is_not_there_or_cut_short_is_refused(saved: tuple[Path, CalibrationStatistics]) -> None:
    path, _ = saved
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refuse(path, "calibrate again")
    refuse(path.with_name("missing"), "calibrate again")
    refuse(path.parent, "calibrate again")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    refuse(path, "not a statistics file")
    path.write_bytes(b"some text\n" * 20)
    refuse(path, "calibrate again")


@pytest.mark.parametrize("tensor", ["mean_abs", "moments.2:4.xx", "moments.2:4.nr"])
def test_a_file_with_a_tensor_missing_is_refused(saved: tuple[Path, CalibrationStatistics], tensor: str) -> None:
    path, _ = saved
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path, metadata=about)
    refuse(path, "calibrate again")
