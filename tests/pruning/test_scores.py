"""Scores against their definitions, by brute force over all spans."""

from __future__ import annotations

import pytest
import torch

from linearpatch_kernels.calibration import CalibrationStatistics, Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.pruning.scores import (
    SCORES,
    check_drop,
    choose_spans,
    score_spans,
    scores_of_statistics,
    short_list,
    span_score,
    spans_of_layers,
)

LAYERS = 8


def random_statistics(seed: int = 0, **given: torch.Tensor) -> CalibrationStatistics:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    depths, samples, tokens = LAYERS + 1, 3, 30
    values = {
        "token_cosine": tokens * random(depths, depths),
        "last_token_angle": samples * random(depths, depths),
        "channel_cosine": samples * random(depths, depths),
        "mean_abs": random(samples, depths, 4),
        "hadamard_mean_abs": random(samples, depths, 4),
    }
    return CalibrationStatistics(samples, tokens, **(values | given))


def definition(statistics: CalibrationStatistics, score: str, start: int, end: int) -> float:
    sums, count = {
        "cosine": (statistics.token_cosine, 30),
        "channel-cosine": (statistics.channel_cosine, 3),
        "angular": (-statistics.last_token_angle, 3),
    }[score]
    return float(sums[start, end]) / count


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drop", [1, 3, 5, 6])
@pytest.mark.parametrize("score", ["cosine", "channel-cosine", "angular"])
def test_the_best_span_of_all(score: str, drop: int, seed: int) -> None:
    statistics = random_statistics(seed)
    # All spans that leave layer 0 and the last layer alone.
    spans = [
        Span(start, end)
        for start in range(LAYERS)
        for end in range(start + 1, LAYERS + 1)
        if end - start == drop and 0 not in range(start, end) and LAYERS - 1 not in range(start, end)
    ]
    expected = {span: definition(statistics, score, *span) for span in spans}
    scores = score_spans(statistics, drop, score)
    assert scores == pytest.approx(expected)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert choose_spans(statistics, drop, score) == [max(expected, key=expected.__getitem__)]


def test_the_default_score_is_the_cosine_per_token() -> None:
    statistics = random_statistics(1)
    assert choose_spans(statistics, 2) == choose_spans(statistics, 2, "cosine")
    others = [choose_spans(statistics, 2, other) for other in scores_of_statistics() if other != "cosine"]
    assert choose_spans(statistics, 2) not in others


@pytest.mark.parametrize("score", ["cosine", "channel-cosine", "angular"])
def test_the_first_and_the_last_layer_stay_however_well_they_score(score: str) -> None:
    tempting = torch.zeros(LAYERS + 1, LAYERS + 1, dtype=torch.float64)
    tempting[0, :] = tempting[:, LAYERS] = 9
    tempting[3, 5] = 1
    statistics = random_statistics(token_cosine=tempting, channel_cosine=tempting, last_token_angle=-tempting)
    assert choose_spans(statistics, 2, score) == [Span(3, 5)]
    assert choose_spans(statistics, LAYERS - 2, score) == [Span(1, LAYERS - 1)]


@pytest.mark.parametrize("score", ["cosine", "channel-cosine", "angular"])
def test_of_equals_the_earlier_span(score: str) -> None:
    same = torch.ones(LAYERS + 1, LAYERS + 1, dtype=torch.float64)
    statistics = random_statistics(token_cosine=same, channel_cosine=same, last_token_angle=same)
    assert list(score_spans(statistics, 3, score)) == [Span(start, start + 3) for start in range(1, 5)]
    assert choose_spans(statistics, 3, score) == [Span(1, 4)]


def with_influence(influence: list[float]) -> CalibrationStatistics:
    """Statistics whose layers have these block influences."""
    cosine = torch.rand(LAYERS + 1, LAYERS + 1, dtype=torch.float64)
    cosine.diagonal(1).copy_(30 * (1 - torch.tensor(influence, dtype=torch.float64)))
    return random_statistics(token_cosine=cosine)


@pytest.mark.parametrize(
    ("drop", "spans"),
    [
        (1, [Span(5, 6)]),
        (2, [Span(2, 3), Span(5, 6)]),
        (3, [Span(2, 4), Span(5, 6)]),
        (4, [Span(2, 4), Span(5, 7)]),
        (5, [Span(2, 7)]),
        (6, [Span(1, 7)]),
    ],
)
def test_block_influence_takes_the_lowest_layers_and_joins_neighbours(drop: int, spans: list[Span]) -> None:
    influence = [0.01, 0.9, 0.2, 0.3, 0.8, 0.1, 0.4, 0.02]
    statistics = with_influence(influence)
    assert statistics.block_influence().tolist() == pytest.approx(influence)
    assert choose_spans(statistics, drop, "bi") == spans


def test_block_influence_of_equals_the_earlier_layers() -> None:
    assert choose_spans(with_influence([0.5] * LAYERS), 3, "bi") == [Span(1, 4)]


@pytest.mark.parametrize(
    ("layers", "spans"),
    [([], []), ([4], [Span(4, 5)]), ([3, 4, 7], [Span(3, 5), Span(7, 8)]), ([1, 2, 3], [Span(1, 4)])],
    ids=str,
)
def test_layers_joined_to_spans(layers: list[int], spans: list[Span]) -> None:
    assert spans_of_layers(layers) == spans


@pytest.mark.parametrize("drop", [-1, 0, 7, 8, 99])
@pytest.mark.parametrize("score", scores_of_statistics())
def test_too_many_layers(drop: int, score: str) -> None:
    message = f"{drop} of 8 layers cannot be dropped: the first and the last stay, so give a number from 1 to 6"
    for run in (lambda: check_drop(drop, LAYERS), lambda: choose_spans(random_statistics(), drop, score)):
        with pytest.raises(InputError) as caught:
            run()
        assert str(caught.value) == message
    check_drop(6, LAYERS)


def test_unknown_scores() -> None:
    with pytest.raises(InputError, match="'perplexity': choose one of cosine, channel-cosine, angular, bi"):
        choose_spans(random_statistics(), 2, "perplexity")
    with pytest.raises(InputError, match=r"'loss': choose one of cosine, channel-cosine, angular, bi$"):
        choose_spans(random_statistics(), 2, "loss")
    with pytest.raises(InputError, match="the score bi is of single layers, not of spans"):
        score_spans(random_statistics(), 2, "bi")


def test_the_short_list_of_a_score_that_runs_the_model() -> None:
    statistics = random_statistics()
    assert SCORES["loss"].runs_the_model
    assert short_list(statistics, 1, "loss") == list(score_spans(statistics, 1, "cosine"))[:5]


def test_the_score_of_a_given_span() -> None:
    statistics, span = random_statistics(), Span(3, 5)
    assert span_score(statistics, span, "angular") == pytest.approx(definition(statistics, "angular", 3, 5))
    assert [span_score(statistics, span, name) for name in ("bi", "loss", "given")] == [None] * 3
