"""The refit of a cut model: what it must restore exactly, what it must leave alone, and that it helps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PartialRun, model_logits, residual_stream
from linearpatch_kernels.healing.refit import FINAL_NORM, PARTS, Refit, RefitRow, Step, refit, steps_of, steps_of_cut
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.span import Span
from tests.support.sink import token_windows
from tests.support.tiny import FAMILY_NAMES, random_patch, tiny_model

KEPT = (0, 1, 4, 5)
FIT, HELD, OTHER = (token_windows(*shape) for shape in ((24, 40, 0), (6, 40, 1), (6, 40, 2)))
STEPS = steps_of_cut(KEPT, 6, 2, in_front=True)
EXACT = RefitSettings(shrinkage=1.0, ridges=(1e-7,))


def student_of(dense: PreTrainedModel) -> PreTrainedModel:
    return keep_layers(dense, KEPT)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def error_at_the_end(student: PreTrainedModel, dense: PreTrainedModel) -> float:
    """Mean over other text's tokens of |x - y|^2 / |y|^2 behind the last layer."""
    with torch.no_grad():
        x, y = (residual_stream(model, OTHER, [num_layers(model)])[num_layers(model)] for model in (student, dense))
    return float(((x - y).square().sum(-1) / y.square().sum(-1)).mean())


def test_the_steps_of_a_cut() -> None:
    assert steps_of_cut((0, 1, 4, 5, 6, 7), 8, 3, in_front=True) == [
        Step(1, None, 4, Span(2, 4)),
        Step(2, 4, 5),
        Step(3, 5, 6),
        Step(4, 6, 7),
    ]
    # With a map at the joint the layer in front stays; two joints side by side share what lies behind them.
    assert steps_of_cut((0, 1, 4, 5, 6, 7), 8, 1, in_front=False) == [Step(2, 4, 5)]
    assert steps_of_cut((0, 2, 4, 5), 6, 2, in_front=True) == [
        Step(0, None, 2, Span(1, 2)),
        Step(1, 2, 4, Span(3, 4)),
        Step(2, 4, 5),
        Step(3, 5, 6),
    ]
    assert steps_of_cut((0, 1), 4, 2, in_front=True) == [Step(1, None, 4, Span(2, 4))]
    assert steps_of_cut(range(6), 6, 3, in_front=True) == []
    # Nothing lies in front of a joint in front of all layers.
    assert steps_of_cut((2, 3, 4), 5, 2, in_front=True) == [Step(0, 2, 3), Step(1, 3, 4)]


def test_the_steps_of_a_merge() -> None:
    # Layers 2 to 4 made one: it has a target where it ends, the layers behind have theirs all the way.
    one = [Span(0, 1), Span(1, 2), Span(2, 5), Span(5, 6), Span(6, 7)]
    assert steps_of(one, 7, 0, in_front=True) == [Step(2, None, 5)]
    assert steps_of(one, 7, 1, in_front=True) == [Step(2, None, 5), Step(3, 5, 6)]
    assert steps_of(one, 7, 3, in_front=False) == [Step(3, 5, 6), Step(4, 6, 7)]
    # A merged layer behind another is one of those behind it, and has no counterpart either.
    two = [Span(0, 2), Span(2, 4), Span(4, 5), Span(5, 6)]
    assert steps_of(two, 6, 1, in_front=True) == [Step(0, None, 2), Step(1, None, 4), Step(2, 4, 5)]
    assert steps_of(two, 6, 1, in_front=False) == [Step(2, 4, 5)]
    # Merged and cut: the layer in front of the joint is the merged one.
    assert steps_of([Span(0, 2), Span(4, 5)], 6, 1, in_front=True) == [Step(0, None, 4), Step(1, 4, 6, Span(5, 6))]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_comes_nearer_to_the_dense_model_on_other_text(family: str) -> None:
    dense = tiny_model(family)
    student = student_of(dense)
    before = state(student), state(dense)
    # Of Gemma only what reads the stream is fitted: with less of it, less shows.
    result = refit(dense, student, STEPS, FIT, HELD, settings=RefitSettings(shrinkage=0.75))
    assert error_at_the_end(result.model, dense) < 0.9 * error_at_the_end(student, dense)
    assert type(result.model) is type(dense)
    assert result.model.config.num_hidden_layers == len(KEPT)
    for model, old in zip((student, dense), before, strict=True):
        assert all(torch.equal(parameter, old[name]) for name, parameter in model.named_parameters())
    assert [(row.layer, row.part) for row in result.rows] == [
        (1, "feed-forward-out"),
        *((layer, part) for layer in (2, 3) for part in PARTS),
        (len(KEPT), FINAL_NORM),
    ]


def test_what_is_normed_on_its_way_to_the_stream_is_left_alone_and_said() -> None:
    dense = tiny_model("gemma3_text")
    result = refit(dense, student_of(dense), STEPS, FIT, HELD)
    left = {row.part: row.why for row in result.rows if not row.projections}
    assert left.keys() == {"attention-out", "feed-forward-out"}
    assert "post_feedforward_layernorm norms what comes out of mlp.down_proj" in left["feed-forward-out"]


@pytest.mark.parametrize(
    ("steps", "settings"),
    [([], None), (STEPS, RefitSettings(ridges=(1e15,))), (STEPS, RefitSettings(shrinkage=0.0))],
    ids=["no step", "an infinite ridge", "nothing of a change kept"],
)
def test_nothing_changes(steps: Sequence[Step], settings: RefitSettings | None) -> None:
    dense = tiny_model("llama")
    student = student_of(dense)
    result = refit(dense, student, steps, FIT, HELD, settings=settings)
    for name, parameter in result.model.named_parameters():
        torch.testing.assert_close(parameter, student.get_parameter(name), rtol=0, atol=1e-6)


def test_removed_layers_that_are_linear_in_what_the_layer_before_wrote_are_restored() -> None:
    dense = tiny_model("llama")
    student = student_of(dense)
    generator = torch.Generator().manual_seed(0)
    written: list[Tensor] = []
    map_ = 0.3 * torch.randn(48, 48, generator=generator)
    layers = decoder_layers(dense)
    layers[1].mlp.register_forward_hook(lambda _module, _args, output: written.append(output))
    layers[2].forward = lambda hidden_states, *_, **__: hidden_states + written[-1] @ map_
    layers[3].forward = lambda hidden_states, *_, **__: hidden_states
    assert error_at_the_end(student, dense) > 0.05
    result = refit(dense, student, STEPS[:1], FIT, HELD, settings=EXACT)
    with torch.no_grad():
        wanted = model_logits(dense, OTHER)
        torch.testing.assert_close(
            model_logits(result.model, OTHER), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())
        )


def test_what_reads_the_stream_takes_a_linear_change_of_it_back() -> None:
    """The student's stream is the dense one, mapped: behind a joint with that map q, k, v, gate and up undo it."""
    dense = tiny_model("llama")
    # Norms divide by the magnitude, so a map that turns the stream and keeps its length is linear behind them, too.
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]
    patch = random_patch("dense")
    with torch.no_grad():
        patch.weight.copy_(turn)
    student = patched_model(keep_layers(dense, range(6)), {2: patch})
    result = refit(dense, student, [Step(2, 2, 3)], FIT, HELD, settings=EXACT)
    before, after = ({row.part: getattr(row, name) for row in result.rows} for name in ("before", "after"))
    assert after["attention-in"] < 1e-6 * before["attention-in"]


def test_a_patch_at_the_joint_is_part_of_what_the_layers_behind_are_fitted_on() -> None:
    dense = tiny_model("llama")
    student = patched_model(student_of(dense), {2: random_patch("hadamard")})
    steps = steps_of_cut(KEPT, 6, 2, in_front=False)
    result = refit(dense, student, steps, FIT, HELD)
    assert type(result.model) is type(student)
    assert error_at_the_end(result.model, dense) < error_at_the_end(student, dense)


def run_until(steps: int) -> tuple[Mapping[str, Tensor], list[RefitRow], PreTrainedModel, PreTrainedModel]:
    dense = tiny_model("llama")
    student = student_of(dense)
    kept: dict[str, Tensor] = {}
    rows: list[RefitRow] = []

    class Killed(Exception):
        pass

    def keep(_: Step, weights: Mapping[str, Tensor], fresh: Sequence[RefitRow]) -> None:
        kept.update({name: weight.detach().clone() for name, weight in weights.items()})
        rows.extend(fresh)
        if sum(row.part == "feed-forward-out" for row in rows) == steps:
            raise Killed

    with pytest.raises(Killed):
        refit(dense, student, STEPS, FIT, HELD, keep=keep)
    return kept, rows, dense, student


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(steps: int) -> None:
    kept, rows, dense, student = run_until(steps)
    whole = refit(dense, student, STEPS, FIT, HELD)
    resumed = refit(dense, student, STEPS, FIT, HELD, done=kept)
    assert rows + resumed.rows == whole.rows
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_what_is_all_done_is_taken_as_it_is() -> None:
    dense = tiny_model("llama")
    kept: dict[str, Tensor] = {}
    whole = refit(dense, student_of(dense), STEPS, FIT, HELD, keep=lambda _, weights, __: kept.update(weights))
    assert "model.norm.weight" in kept
    again = refit(dense, student_of(dense), STEPS, FIT, HELD, done=kept)
    assert again.rows == []
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_final_norm_gets_the_factor_of_least_squares(family: str) -> None:
    dense = tiny_model(family)
    student = student_of(dense)
    settings = RefitSettings(ridges=(1e-6,))
    layers_alone = refit(dense, student, STEPS, FIT, HELD, settings=dataclasses.replace(settings, final_norm=False))
    result = refit(dense, student, STEPS, FIT, HELD, settings=settings)
    with torch.no_grad():
        wanted, before, after = (
            PartialRun(model, "tokens", "hidden")(FIT[::4]).double()
            for model in (dense, layers_alone.model, result.model)
        )
    factor = float((wanted * before).sum() / before.square().sum())
    assert abs(factor - 1) > 1e-3
    assert result.rows[-1].scale == pytest.approx(factor, abs=1e-5)
    torch.testing.assert_close(after, factor * before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert result.rows[-1].after < result.rows[-1].before


def test_half_precision_weights_stay_that() -> None:
    dense = tiny_model("llama").to(torch.bfloat16)
    student = student_of(dense)
    result: Refit = refit(dense, student, STEPS, FIT, HELD)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert error_at_the_end(result.model, dense) < error_at_the_end(student, dense)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": [Step(4, 5, 6)]}, "no steps through 4 layers"),
        ({"steps": [Step(2, 4, 5), Step(1, None, 4)]}, "no steps through 4 layers"),
        ({"fit": FIT + 97}, "vocabulary ends at 96"),
        ({"held": HELD[:, :20]}, "same length"),
    ],
)
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], words: str) -> None:
    dense = tiny_model("llama")
    given = {"steps": STEPS, "fit": FIT, "held": HELD} | changes
    with pytest.raises(InputError, match=words):
        refit(dense, student_of(dense), given["steps"], given["fit"], given["held"])


@pytest.mark.parametrize("wrong", [{"behind": -1}, {"shrinkage": 1.5}, {"ridges": ()}, {"ridges": (0.0,)}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RefitSettings(**wrong)
