"""Distilling merged layers: what is minimised, what moves, and that it helps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.distillation import hierarchical
from linearpatch_kernels.distillation.hierarchical import (
    LAYERS,
    Group,
    GroupsLoss,
    HierarchicalDistillation,
    HierarchySettings,
    distill_merged,
    merged_groups,
    stream_depths,
    stream_error,
)
from linearpatch_kernels.distillation.settings import STREAM_ERRORS
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainable import check_trainable
from linearpatch_kernels.distillation.trainer import TrainingSettings
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import residual_stream
from linearpatch_kernels.healing.merge_search import plan_merging
from linearpatch_kernels.merging.merge import choose_units, merge_layers
from linearpatch_kernels.merging.sensitivity import score_layers
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.modeling.patched import patched_model, patches
from linearpatch_kernels.nn import DensePatch
from linearpatch_kernels.ops.topk_kl import topk_kl_loss
from tests.support.students import HELDOUT, TRAINING
from tests.support.tiny import FAMILY_NAMES, tiny_model


def merged_of(model: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
    """Layers 1 and 2 of six made one, and 3 and 4: half of the units of each."""
    scores = score_layers(model, windows[:2])
    for start in (3, 1):
        model = merge_layers(model, choose_units(scores, Span(start, start + 2), (0.5, 0.5)))
    return model


@pytest.fixture(scope="session")
def states(dense: PreTrainedModel, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    """With the states of all depths."""
    place = Path(tmp_path_factory.mktemp("states"))
    return write_teacher_store(dense, windows, place, top_k=10, shard_windows=5, depths=range(7))


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(
    student: PreTrainedModel,
    store: TeacherStore,
    hierarchy: HierarchySettings | None = None,
    directory: Path | None = None,
    **settings: Any,
) -> HierarchicalDistillation:
    arguments = {"steps": 8, "learning_rate": 3e-3, "train": "merged", **settings}
    return distill_merged(
        student,
        store,
        training=TRAINING,
        heldout=HELDOUT,
        settings=TrainingSettings(**arguments),
        hierarchy=hierarchy,
        directory=directory,
        checkpoint_seconds=0,
    )


MERGED = ("model.layers.1.", "model.layers.2.")


def test_what_a_merged_layer_stands_for(dense: PreTrainedModel, windows: Tensor) -> None:
    student = merged_of(dense, windows)
    assert merged_groups(student) == [Group(1, Span(1, 3)), Group(2, Span(3, 5))]
    assert stream_depths(student, HierarchySettings()) == [3, 5]
    assert stream_depths(student, HierarchySettings(group_steps=1)) == [1, 3, 5]
    deeper, _ = plan_merging(dense, windows, None, MergeSettings(layers=2))
    groups = merged_groups(deeper)
    assert sum(group.span.length - 1 for group in groups) == 4
    with pytest.raises(InputError, match="no merged layers"):
        merged_groups(dense)


def test_merged_layers_in_front_of_the_joint_are_not_trained(dense: PreTrainedModel, windows: Tensor) -> None:
    """They would get no gradient: the run starts behind them."""
    student = merged_of(dense, windows)
    assert {name.split(".")[2] for name in check_trainable(student, 1, "merged")} == {"1", "2"}
    assert {name.split(".")[2] for name in check_trainable(student, 2, "merged")} == {"2"}
    with pytest.raises(InputError, match="no merged layer to train from the joint on"):
        check_trainable(student, 3, "merged")


@pytest.mark.parametrize("error", STREAM_ERRORS)
def test_the_loss_is_the_formula(error: str, dense: PreTrainedModel, windows: Tensor, states: TeacherStore) -> None:
    """From the depth of the first group on, against the whole model in float64 by the book."""
    student = merged_of(dense, windows)
    batch = states.batch([3, 4], [3, 5])
    names = [LAYERS, "tail", "topk"]
    start = residual_stream(student, batch.input_ids, [1])[1]
    loss = GroupsLoss(student, 1, torch.float32, merged_groups(student), error)
    targets = [batch.states[3], batch.states[5]]
    found = loss(start, batch.probs, batch.ids, targets, names)
    book = copy.deepcopy(student).double()
    output = book(batch.input_ids, output_hidden_states=True)
    streams = [output.hidden_states[2], output.hidden_states[3]]
    terms = []
    for stream, target in zip(streams, targets, strict=True):
        squares = (stream - target.double()) ** 2
        per_token = squares.sum(-1) / (target.double() ** 2).sum(-1)
        terms.append(per_token.mean() if error == "relative" else squares.mean())
    probs, ids = batch.probs.double().flatten(0, 1), batch.ids.flatten(0, 1)
    logits = output.logits.flatten(0, 1)
    expected = [
        sum(terms) / 2,
        topk_kl_loss(logits, probs, ids, normalization="tail"),
        topk_kl_loss(logits, probs / probs.sum(-1, keepdim=True), ids, normalization="topk"),
    ]
    for value, wanted in zip(found, expected, strict=True):
        assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    weights = torch.tensor([0.7, 1.0, 0.0])
    # The gradient too, of a weight of either group.
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
    ours = torch.autograd.grad(found @ weights, [student.get_parameter(name) for name in names])
    total = sum(float(w) * v for w, v in zip(weights, expected, strict=True))
    theirs = torch.autograd.grad(total, [book.get_parameter(name) for name in names])
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4


def test_a_token_of_huge_values_counts_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 5, 7, generator=generator)
    x = y + 0.1 * torch.randn(2, 5, 7, generator=generator)
    scale = torch.ones(2, 5, 1)
    scale[0, 0] = 1e4
    torch.testing.assert_close(stream_error(x * scale, y * scale, "relative"), stream_error(x, y, "relative"))
    assert float(stream_error(x * scale, y * scale, "mse")) > 1e4 * float(stream_error(x, y, "mse"))
    assert float(stream_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), "relative")) == 0


def test_every_term_alone_falls_and_together_both_do(
    dense: PreTrainedModel, windows: Tensor, states: TeacherStore
) -> None:
    both = train(merged_of(dense, windows), states, HierarchySettings(weight=10.0), steps=30).together
    assert both.heldout(both.best_step) < 0.99 * both.heldout(0)
    assert both.heldout(both.steps, LAYERS) < 0.95 * both.heldout(0, LAYERS)
    kl_alone = train(merged_of(dense, windows), states, HierarchySettings(weight=0.0), steps=30).together
    assert both.heldout(both.steps, LAYERS) < kl_alone.heldout(kl_alone.steps, LAYERS)


def test_a_group_on_its_own_learns_and_touches_nothing_else(
    dense: PreTrainedModel, windows: Tensor, states: TeacherStore
) -> None:
    teacher, student = state_of(dense), merged_of(dense, windows)
    before = state_of(student)
    run = train(student, states, HierarchySettings(group_steps=12), learning_rate=3e-3, steps=1, patience=1)
    assert sorted(run.alone) == [1, 2]
    for outcome in run.alone.values():
        assert outcome.best_step > 0
        assert outcome.after < 0.95 * outcome.before
    assert all(name.startswith(MERGED) for name in changed(before, state_of(student)))
    assert changed(teacher, state_of(dense)) == set()


@pytest.mark.parametrize("what", ["merged", "patch+norms", "lora", "suffix"])
def test_only_what_was_chosen_moves(what: str, dense: PreTrainedModel, windows: Tensor, states: TeacherStore) -> None:
    student = merged_of(dense, windows)
    teacher, before = state_of(dense), state_of(student)
    run = train(student, states, HierarchySettings(group_steps=3), train=what, lora_rank=2)
    after = changed(before, state_of(student))
    assert run.together.best_step > 0
    assert changed(teacher, state_of(dense)) == set()
    assert not [name for name in after if "layers.0." in name or "embed" in name or "lm_head" in name]
    if what == "merged":
        assert after == {name for name in before if name.startswith(MERGED)}
    else:
        assert "model.norm.weight" in after
        assert bool([name for name in after if "_proj" in name]) == (what in ("lora", "suffix"))
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family(family: str, windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    store = write_teacher_store(model, windows, tmp_path / "store", top_k=10, depths=range(7))
    student, _ = plan_merging(model, windows[:2], None, MergeSettings(layers=5))
    run = train(student, store, HierarchySettings(group_steps=6), steps=12)
    assert all(outcome.after < outcome.before for outcome in run.alone.values())
    assert run.together.heldout(run.together.best_step) < run.together.heldout(0)


def test_a_patch_behind_a_merged_layer_is_part_of_it(
    dense: PreTrainedModel, windows: Tensor, states: TeacherStore
) -> None:
    generator = torch.Generator().manual_seed(0)
    patch = DensePatch.from_dense(torch.eye(48) + 0.05 * torch.randn(48, 48, generator=generator))
    student = patched_model(merged_of(dense, windows), {2: patch})
    batch = states.batch([3], [3, 5])
    targets = list(batch.states.values())
    loss = GroupsLoss(student, 1, torch.float32, merged_groups(student), "relative")
    with torch.no_grad():
        start = residual_stream(student, batch.input_ids, [1])[1]
        streams = residual_stream(student, batch.input_ids, [2, 3])
        expected = [stream_error(patches(student)[2](streams[2]), targets[0], "relative")]
        expected.append(stream_error(streams[3], targets[1], "relative"))
        found, _ = loss(start, batch.probs, batch.ids, targets, [LAYERS, "tail"])
    assert float(found) == pytest.approx(float(sum(expected)) / 2, rel=1e-5)
    run = train(student, states, train="patch").together
    assert run.parameters == 48 * 48
    assert run.heldout(run.best_step) < run.heldout(0)
    with pytest.raises(InputError, match="without patches"):
        train(student, states, HierarchySettings(group_steps=2))


def test_a_run_that_was_stopped_goes_on(
    dense: PreTrainedModel, windows: Tensor, states: TeacherStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, settings = merged_of(dense, windows), HierarchySettings(group_steps=4)
    expected = train(whole, states, settings)
    real, calls = hierarchical.distill, []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        calls.append(settings["directory"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(hierarchical, "distill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(merged_of(dense, windows), states, settings, tmp_path)
    assert (tmp_path / "group-1.safetensors").exists()
    assert not (tmp_path / "group-2.safetensors").exists()
    student = merged_of(dense, windows)
    resumed = train(student, states, settings, tmp_path)
    # The finished group was not trained again.
    assert [call.name for call in calls] == ["group-1", "group-2", "group-2", "together"]
    assert changed(state_of(whole), state_of(student)) == set()
    assert resumed.together.curve == expected.together.curve
    with pytest.raises(InputError, match="other settings"):
        train(merged_of(dense, windows), states, settings, tmp_path, learning_rate=1e-3)
    with pytest.raises(InputError, match="other settings"):
        train(merged_of(dense, windows), states, HierarchySettings(weight=0.5, group_steps=4), tmp_path)


def test_what_is_refused(dense: PreTrainedModel, windows: Tensor, store: TeacherStore) -> None:
    student = merged_of(dense, windows)
    with pytest.raises(InputError, match="lacks the states of depth 3, 5"):
        train(student, store)
    with pytest.raises(InputError, match="no merged layers"):
        train(dense, store)
    with pytest.raises(InputError, match="`layer_error`"):
        HierarchySettings(error="cosine")
    with pytest.raises(InputError, match="negative"):
        HierarchySettings(weight=-1.0)


def test_authors_merges_learn_too(dense: PreTrainedModel, windows: Tensor, states: TeacherStore) -> None:
    student, _ = plan_merging(dense, windows[:2], None, MergeSettings(layers=4, rule="authors"))
    run = train(student, states).together
    assert run.heldout(run.best_step) < run.heldout(0)


@pytest.mark.parametrize("harm", [0.0, 5.0])
def test_groups_that_do_harm_together_are_not_kept(
    dense: PreTrainedModel, windows: Tensor, states: TeacherStore, monkeypatch: pytest.MonkeyPatch, harm: float
) -> None:
    """Each group is best by its own layer's error; together they may be worse than what they began with."""
    student = merged_of(dense, windows)
    before, learn = state_of(student), hierarchical._Groups.train

    def harmful(self: Any, *arguments: Any) -> Any:
        found = learn(self, *arguments)
        if harm:
            for layer in found:
                weight = student.model.layers[layer].mlp.down_proj.weight
                student.model.layers[layer].mlp.down_proj.weight = torch.nn.Parameter(harm * weight)
        return found

    monkeypatch.setattr(hierarchical._Groups, "train", harmful)
    told: list[str] = []
    run = distill_merged(
        student,
        states,
        training=TRAINING,
        heldout=HELDOUT,
        settings=TrainingSettings(steps=2, learning_rate=3e-4, train="merged"),
        hierarchy=HierarchySettings(group_steps=3),
        noted=told.append,
    )
    assert set(run.alone) == {1, 2}
    assert (changed(before, state_of(student)) == set()) == bool(harm)
    assert bool(told) == bool(harm)
    assert not harm or "the layers stay as they were" in told[0]
