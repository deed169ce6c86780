"""Which layers to remove, by the held-out loss of the refitted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import evaluate_quality
from linearpatch_kernels.healing import search
from linearpatch_kernels.healing.choice import heal_cut
from linearpatch_kernels.healing.refit import refit, steps_of_cut
from linearpatch_kernels.healing.search import Search
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.span import Span
from tests.support.sink import token_windows
from tests.support.tiny import tiny_model

FIT, HELD = token_windows(12, 30, 0), token_windows(4, 30, 1)
LAYERS = 7


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_model("llama", layers=LAYERS)


def test_the_span_is_the_one_that_heals_best(dense: PreTrainedModel) -> None:
    spans = [Span(start, start + 2) for start in (4, 1, 2, 3)]
    losses = {}
    for span in spans:
        plan = PrunePlan(LAYERS, (Joint(span, None),))
        losses[span] = evaluate_quality(heal_cut(dense, plan, FIT, HELD, heal="refit").model, HELD).loss
    told: dict[str, float] = {}
    chosen = Search(dense, FIT, HELD, keep=told.__setitem__).spans(spans)
    assert chosen == [min(losses, key=lambda span: losses[span])]
    assert told == pytest.approx({str(span): loss for span, loss in losses.items()}, rel=1e-5)


def test_layers_go_one_after_the_other_from_the_refitted_model(dense: PreTrainedModel) -> None:
    told: dict[str, float] = {}
    chosen = Search(dense, FIT, HELD, keep=told.__setitem__).layers(2)
    assert sum(span.length for span in chosen) == 2
    # By hand: every inner layer from the model, then every inner layer from the best of these, refitted again.
    first = {}
    for layer in range(1, LAYERS - 1):
        kept = [index for index in range(LAYERS) if index != layer]
        steps = steps_of_cut(kept, LAYERS, 3, in_front=True)
        first[layer] = refit(dense, keep_layers(dense, kept), steps, FIT, HELD).model
    losses = {layer: evaluate_quality(model, HELD).loss for layer, model in first.items()}
    best = min(losses, key=lambda layer: losses[layer])
    kept = [index for index in range(LAYERS) if index != best]
    for index in range(1, LAYERS - 2):
        stay = [layer for layer in kept if layer != kept[index]]
        near = [step for step in steps_of_cut(stay, LAYERS, 3, in_front=True) if index - 1 <= step.index < index + 3]
        cut = keep_layers(first[best], [place for place in range(LAYERS - 1) if place != index])
        loss = evaluate_quality(refit(dense, cut, near, FIT, HELD).model, HELD).loss
        gone = sorted({best, kept[index]})
        name = f"{gone[0]}:{gone[1] + 1}" if gone[1] == gone[0] + 1 else ",".join(f"{one}:{one + 1}" for one in gone)
        assert told[name] == pytest.approx(loss, rel=1e-5), name
    assert told.keys() >= {f"{layer}:{layer + 1}" for layer in losses}
    second = {
        name: loss for name, loss in told.items() if sum(Span.parse(part).length for part in name.split(",")) == 2
    }
    assert ",".join(map(str, chosen)) == min(second, key=lambda name: second[name])


@pytest.mark.parametrize("how", ["spans", "layers"])
def test_what_is_known_is_not_tried_again(how: str, dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(known: Any = None) -> tuple[list[Span], dict[str, float]]:
        told: dict[str, float] = {}
        made = Search(dense, FIT, HELD, known=known, keep=told.__setitem__)
        return made.spans([Span(1, 3), Span(3, 5)]) if how == "spans" else made.layers(2), told

    whole, told = run()
    some = dict(list(told.items())[: len(told) - 1])
    again, rest = run(some)
    assert again == whole
    assert rest == {name: loss for name, loss in told.items() if name not in some}
    monkeypatch.setattr(search, "compare_quality", lambda *_, **__: pytest.fail("a cut was tried again"))
    assert run(told)[0] == whole


def test_layers_go_until_the_loss_is_above_the_limit(dense: PreTrainedModel) -> None:
    told: dict[str, float] = {}
    Search(dense, FIT, HELD, keep=told.__setitem__).layers(3)
    by_layers = {name: sum(Span.parse(part).length for part in name.split(",")) for name in told}
    least = [min(told[name] for name in told if by_layers[name] == count) for count in (1, 2, 3)]
    beyond = next(count for count, loss in enumerate(least) if loss > least[0])
    within = Search(dense, FIT, HELD).layers(most=(least[0] + least[beyond]) / 2)
    assert sum(span.length for span in within) == beyond
    with pytest.raises(InputError, match="above the limit already"):
        Search(dense, FIT, HELD).layers(most=least[0] - 1e-3)


def test_the_depth_within_a_limit_is_found_by_bisection(dense: PreTrainedModel) -> None:
    told: dict[str, float] = {}
    cuts = {count: [Span(1, 2), Span(3, 2 + count)] if count > 1 else [Span(1, 2)] for count in range(1, LAYERS - 2)}
    losses = {}
    for count, spans in cuts.items():
        plan = PrunePlan(LAYERS, tuple(Joint(span, None) for span in spans))
        losses[count] = evaluate_quality(heal_cut(dense, plan, FIT, HELD, heal="refit").model, HELD).loss
    made = Search(dense, FIT, HELD, keep=told.__setitem__)
    found = made.depth((losses[2] + losses[3]) / 2, lambda count: cuts.get(count, [Span(1, 1 + count)]))
    assert losses[2] < losses[3]
    assert found == 2
    for name, loss in told.items():
        spans = [Span.parse(part) for part in name.split(",")]
        assert loss == pytest.approx(losses[sum(span.length for span in spans)], rel=1e-5)
    assert made.dense_loss() == pytest.approx(evaluate_quality(dense, HELD).loss)
    assert told[""] == made.dense_loss()
    with pytest.raises(InputError, match="above the limit already"):
        made.depth(losses[1] - 1e-3, cuts.__getitem__)


def test_few_windows_are_enough_to_compare(dense: PreTrainedModel) -> None:
    many = token_windows(100, 30, 0)
    made = Search(dense, many, HELD)
    assert len(made.windows) == search.TRIAL_WINDOWS
    assert all(any(torch.equal(one, other) for other in many) for one in made.windows)


def test_what_cannot_be_searched(dense: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="cannot be dropped"):
        Search(dense, FIT, HELD).layers(LAYERS - 1)
    with pytest.raises(InputError, match="finite on the held-out windows"):
        Search(dense, FIT, HELD, known={"1:2": float("inf")}).spans([Span(1, 2)])
