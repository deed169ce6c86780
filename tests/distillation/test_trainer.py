"""Training from the joint on: that it is full training, what it trains, and that it learns."""

from __future__ import annotations

import copy
import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.distillation.forms import reformed
from linearpatch_kernels.distillation.settings import LOSSES, TrainingSettings
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainable import prepare
from linearpatch_kernels.distillation.trainer import (
    Distillation,
    Step,
    SuffixLoss,
    check_same_run,
    distill,
)
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import read_seal
from linearpatch_kernels.modeling.families import norm_gains
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import DensePatch, HadamardPatch, PatchChain
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from tests.support.students import HELDOUT, JOINT, TRAINING, student_of
from tests.support.tiny import FAMILY_NAMES, random_patch, tiny_model


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(
    student: PreTrainedModel, store: TeacherStore, directory: Path | None = None, **settings: Any
) -> Distillation:
    arguments = {"steps": 8, "learning_rate": 3e-3, **settings}
    return distill(
        student,
        store,
        joint=JOINT,
        training=TRAINING,
        heldout=HELDOUT,
        settings=TrainingSettings(**arguments),
        directory=directory,
        checkpoint_seconds=0,
    )


def full_training(student: PreTrainedModel, store: TeacherStore, names: set[str], run: Distillation, loss: str) -> None:
    """The same steps through the whole model, by the book: nothing is cached, everything runs from the tokens.

    It leaves gradients and frozen parameters: the student is to have its own.
    """
    settings = TrainingSettings(steps=8, learning_rate=3e-3, loss=loss)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    trained = {name: parameter for name, parameter in student.named_parameters() if name in names}
    matrices = [parameter for parameter in trained.values() if parameter.dim() == 2]
    vectors = [parameter for parameter in trained.values() if parameter.dim() == 1]
    groups = [{"params": matrices, "rate": 1}, {"params": vectors, "rate": 10}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, weight_decay=0.0, foreach=False)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for step in range(run.best_step):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step) * group["rate"]
        batch = store.batch([int(order[step])])
        hidden = student.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        probs = batch.probs.flatten(0, 1)
        if loss == "topk":
            probs = probs / probs.sum(-1, keepdim=True)
        value = linear_topk_kl_loss(
            hidden, student.lm_head.weight.detach(), probs, batch.ids.flatten(0, 1), normalization=loss
        )
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0, foreach=False)
        optimizer.step()
        assert float(value.detach()) == pytest.approx(run.log[step]["loss"], rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["dense", "hadamard", "low-rank", "norm-linear"])
def test_it_is_full_training_bit_for_bit(dense: PreTrainedModel, store: TeacherStore, kind: str, loss: str) -> None:
    patch = random_patch(kind)
    ours, theirs = student_of(dense, patch), student_of(copy.deepcopy(dense), patch)
    before = state_of(ours)
    run = train(ours, store, loss=loss)
    assert run.best_step > 0
    names = {name for name in before if ".patch." in name}
    assert changed(before, state_of(ours)) == names
    full_training(theirs, store, names, run, loss)
    assert changed(state_of(ours), state_of(theirs)) == set()


def test_norm_gains_too(dense: PreTrainedModel, store: TeacherStore) -> None:
    # Full training, unlike ours, writes to the weights that a student shares with the model it was cut from.
    ours, theirs = student_of(dense), student_of(copy.deepcopy(dense))
    teacher, before = state_of(dense), state_of(ours)
    run = train(ours, store, train="patch+norms")
    gains = {f"model.layers.{i}.{norm}_layernorm.weight" for i in (2, 3) for norm in ("input", "post_attention")}
    assert changed(before, state_of(ours)) == {"model.layers.2.patch.0.weight", "model.norm.weight", *gains}
    # The teacher shared those gains with the student.
    assert changed(teacher, state_of(dense)) == set()
    full_training(theirs, store, {"model.layers.2.patch.0.weight", "model.norm.weight", *gains}, run, "tail")
    assert changed(state_of(ours), state_of(theirs)) == set()


def test_the_prefix_runs_without_gradients_and_not_at_all_where_its_states_are_kept(
    dense: PreTrainedModel, windows: Tensor, tmp_path: Path, count_calls: Callable[..., list[int]]
) -> None:
    kept = write_teacher_store(dense, windows, tmp_path / "kept", top_k=10, depths=[JOINT])
    student = student_of(dense)
    seen = count_calls(student.model.layers)
    run = train(student, kept, steps=3, evaluate_every=100)
    assert seen[:JOINT] == [0, 0]
    assert seen[JOINT:] == [3 + 3 * 2] * 2  # three steps, and the three held-out windows at the start and the end
    # bfloat16 states are not exactly those of the prefix; the run is close to the exact one.
    exact = train(student_of(dense), write_teacher_store(dense, windows, tmp_path / "no", top_k=10), steps=3)
    assert run.curve[0]["tail"] == pytest.approx(exact.curve[0]["tail"], rel=1e-2)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("what", ["patch", "patch+norms", "lora", "suffix"])
def test_every_family_learns(family: str, what: str, windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    teacher = state_of(model)
    store = write_teacher_store(model, windows, tmp_path / "store", top_k=10)
    student = student_of(model)
    before = state_of(student)
    run = train(student, store, train=what, steps=12, lora_rank=2)
    assert run.heldout(run.best_step) < 0.99 * run.heldout(0)
    after = changed(before, state_of(student))
    assert {name for name in after if ".patch." in name} == {"model.layers.2.patch.0.weight"}
    assert not [name for name in after if "layers.0." in name or "layers.1." in name or "embed" in name]
    assert bool([name for name in after if "norm" in name]) == (what != "patch")
    assert bool([name for name in after if "_proj" in name]) == (what in ("lora", "suffix"))
    assert changed(teacher, state_of(model)) == set()
    # What it was left with is what the held-out windows were measured with.
    assert measured(student, store) == pytest.approx(run.heldout(run.best_step), rel=1e-4)
    assert all(parameter.requires_grad for parameter in student.parameters())


def measured(student: PreTrainedModel, store: TeacherStore) -> float:
    """The held-out KL with one bucket for the rest, from the model's own logits."""
    batch = store.batch(list(HELDOUT))
    with torch.no_grad():
        logits = student(batch.input_ids).logits.flatten(0, 1)
    return float(topk_kl_loss(logits, batch.probs.flatten(0, 1), batch.ids.flatten(0, 1), normalization="tail"))


def test_the_next_tokens_alone_can_be_learnt(dense: PreTrainedModel, windows: Tensor, store: TeacherStore) -> None:
    """With all of the weight on them, the loss is the cross-entropy of the text itself."""
    student, tokens = student_of(dense), windows[:9]

    def cross_entropy(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            logits = student(tokens).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")

    before = cross_entropy(tokens).mean()
    first = int(torch.randperm(9, generator=torch.Generator().manual_seed(0))[0])
    batch = store.batch([first])
    with torch.no_grad():
        end = student(batch.input_ids).logits[0, -1:]
    last = topk_kl_loss(end, batch.probs[0, -1:], batch.ids[0, -1:], normalization="tail")
    settings = TrainingSettings(steps=30, learning_rate=3e-3, train="suffix", label_weight=1.0)
    start = cross_entropy(tokens[first : first + 1]).sum()
    run = distill(student, store, joint=JOINT, training=TRAINING, heldout=TRAINING, settings=settings)
    assert run.log[0]["loss"] == pytest.approx(float(start + last) / 20, rel=1e-5)
    assert run.best_step > 0
    assert cross_entropy(tokens).mean() < 0.9 * before


def test_logits_that_are_capped(windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", final_logit_softcapping=3.0)
    store = write_teacher_store(model, windows, tmp_path / "store", top_k=10)
    student = student_of(model)
    run = train(student, store)
    assert run.heldout(run.best_step) < run.heldout(0)
    assert measured(student, store) == pytest.approx(run.heldout(run.best_step), rel=1e-4)


def test_a_joint_behind_the_last_layer(dense: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    student = apply_plan(dense, PrunePlan(6, (Joint(Span(4, 6), random_patch("dense"), "test"),)))
    store = write_teacher_store(dense, windows, tmp_path / "store", top_k=10)
    before = state_of(student)
    settings = TrainingSettings(steps=8, learning_rate=3e-3)
    run = distill(student, store, joint=4, training=TRAINING, heldout=HELDOUT, settings=settings)
    assert changed(before, state_of(student)) == {"model.layers.3.output_patch.0.weight"}
    assert run.heldout(run.best_step) < run.heldout(0)
    assert measured(student, store) == pytest.approx(run.heldout(run.best_step), rel=1e-4)


def test_two_joints(dense: PreTrainedModel, store: TeacherStore) -> None:
    joints = (Joint(Span(1, 2), random_patch("dense"), "test"), Joint(Span(3, 4), random_patch("low-rank"), "test"))
    student = apply_plan(dense, PrunePlan(6, joints))
    before = state_of(student)
    settings = TrainingSettings(steps=8, learning_rate=3e-3)
    run = distill(student, store, joint=1, training=TRAINING, heldout=HELDOUT, settings=settings)
    trained = {"model.layers.1.patch.0.weight", "model.layers.2.patch.0.down", "model.layers.2.patch.0.up"}
    assert changed(before, state_of(student)) == trained
    assert measured(student, store) == pytest.approx(run.heldout(run.best_step), rel=1e-4)
    assert run.heldout(run.best_step) < run.heldout(0)


def test_accumulation_and_batches_give_the_same_gradient(dense: PreTrainedModel, store: TeacherStore) -> None:
    runs = [
        train(student_of(dense), store, windows_per_step=4, micro_batch=micro, steps=6, clip=0.0) for micro in (1, 3, 4)
    ]
    for other in runs[1:]:
        for line, its in zip(runs[0].log, other.log, strict=True):
            assert its["loss"] == pytest.approx(line["loss"], rel=1e-4)
            assert its["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-3)


def test_half_precision_trains_float32_masters(windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    store = write_teacher_store(model, windows, tmp_path / "store", top_k=10)
    student = student_of(model)
    assert patches(student)[2][0].weight.dtype == torch.bfloat16
    run = train(student, store, train="patch+norms", steps=12)
    assert run.heldout(run.best_step) < 0.97 * run.heldout(0)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert measured(student, store) == pytest.approx(run.heldout(run.best_step), rel=0.05)


def test_bfloat16_products_are_close_to_float32(dense: PreTrainedModel, store: TeacherStore) -> None:
    exact, mixed = (train(student_of(dense), store, precision=precision) for precision in ("float32", "bfloat16"))
    assert mixed.log[0]["loss"] != exact.log[0]["loss"]
    assert mixed.log[0]["loss"] == pytest.approx(exact.log[0]["loss"], rel=2e-2)
    assert mixed.log[0]["gradient_norm"] == pytest.approx(exact.log[0]["gradient_norm"], rel=5e-2)


def test_an_interrupt_loses_nothing(dense: PreTrainedModel, store: TeacherStore, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a run that writes no checkpoint by itself: the step is finished and written."""
    unbroken = student_of(dense)
    train(unbroken, store)
    handler = signal.getsignal(signal.SIGINT)

    def interrupting(step: Step) -> None:
        if step.done == 3:
            signal.raise_signal(signal.SIGINT)

    settings = TrainingSettings(steps=8, learning_rate=3e-3)
    places: dict[str, Any] = {"joint": JOINT, "training": TRAINING, "heldout": HELDOUT, "directory": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        distill(student_of(dense), store, settings=settings, on_step=interrupting, checkpoint_seconds=1e9, **places)
    assert signal.getsignal(signal.SIGINT) is handler
    assert read_seal(tmp_path / "state.safetensors")[0]["step"] == 4
    student, done = student_of(dense), []
    distill(student, store, settings=settings, on_step=lambda step: done.append(step.done), **places)
    assert done == [5, 6, 7, 8]
    assert changed(state_of(unbroken), state_of(student)) == set()


def test_the_best_look_is_kept(dense: PreTrainedModel, store: TeacherStore) -> None:
    """A rate that is far too large makes everything worse: the start is what stays."""
    student = student_of(dense)
    before = state_of(student)
    run = train(student, store, learning_rate=30.0, clip=0.0, patience=2, steps=40, evaluate_every=1)
    assert run.best_step == 0
    assert run.steps == 2
    assert changed(before, state_of(student)) == set()


def test_the_schedule() -> None:
    settings = TrainingSettings(steps=105, warmup_steps=5, learning_rate=2.0, final_share=0.05)
    rates = [settings.rate(step) for step in range(105)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[55] == pytest.approx(0.5 * (2.0 + 0.1))
    assert settings.rate(105) == pytest.approx(0.1)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert [step for step in range(106) if settings.looks(step)] == [*range(0, 101, 10), 105]


def test_the_log_and_what_is_resumed(dense: PreTrainedModel, store: TeacherStore, tmp_path: Path) -> None:
    run = train(student_of(dense), store, tmp_path / "run", train="patch+norms")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines == list(run.log)
    assert lines[-1]["heldout_tail"] == run.curve[-1]["tail"]
    # A finished run makes no step again.
    student = student_of(dense)
    again = train(student, store, tmp_path / "run", train="patch+norms")
    assert (again.steps, again.best_step, again.curve, again.log) == (8, run.best_step, run.curve, run.log)
    assert measured(student, store) == pytest.approx(run.heldout(run.best_step), rel=1e-4)


def test_runs_that_cannot_go_on(dense: PreTrainedModel, store: TeacherStore, tmp_path: Path) -> None:
    train(student_of(dense), store, tmp_path)
    with pytest.raises(InputError, match=r"unfinished run of other settings \(learning_rate 0.003 there\)"):
        train(student_of(dense), store, tmp_path, learning_rate=1e-3)
    with pytest.raises(InputError, match=r"other settings \(student [-\w]+ there\)"):
        train(student_of(dense, random_patch("dense", seed=9)), store, tmp_path)
    state = tmp_path / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-50] ^= 4
    state.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged: .*delete .* to start the training again"):
        train(student_of(dense), store, tmp_path)
    with pytest.raises(InputError, match="of another version"):
        check_same_run({"settings": {}, "store": {}}, {"settings": {}, "store": {}, "new": 1}, tmp_path)


@pytest.mark.parametrize("room", [10_000, 150])
def test_a_disk_that_fills_up_costs_no_step_twice(
    dense: PreTrainedModel, store: TeacherStore, tmp_path: Path, room: int
) -> None:
    """A limit on the size of a file refuses the checkpoint, or already the log; with room again the run goes on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(InputError, match=r"could not be written \(File too large\): make room"):
            train(student_of(dense), store, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    ours, theirs = student_of(dense), student_of(dense)
    run = train(ours, store, tmp_path)
    assert [line["step"] for line in run.log] == list(range(1, 9))
    train(theirs, store)
    assert changed(state_of(ours), state_of(theirs)) == set()


def test_what_is_refused(dense: PreTrainedModel, store: TeacherStore) -> None:
    plain = apply_plan(dense, PrunePlan(6, (Joint(Span(2, 4)),)))
    with pytest.raises(InputError, match="no patch to train"):
        train(plain, store)
    with pytest.raises(InputError, match="give more text"):
        distill(student_of(dense), store, joint=JOINT, training=[], heldout=[1])
    broken = student_of(dense)
    with torch.no_grad():
        patches(broken)[2][0].weight[3, 4] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        train(broken, store)
    for wrong in (
        {"train": "all"},
        {"loss": "mse"},
        {"precision": "int8"},
        {"recompute": "half"},
        {"steps": 0},
        {"patience": -1},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            TrainingSettings(**wrong)
    with pytest.raises(InputError, match="among 3 processes"):
        TrainingSettings(windows_per_step=4).check_processes(3)
    with pytest.raises(InputError, match="`learning_rate` must be positive"):
        TrainingSettings(learning_rate=0.0)


def test_a_plain_removal_can_train_norms_and_lora(dense: PreTrainedModel, store: TeacherStore) -> None:
    student = apply_plan(dense, PrunePlan(6, (Joint(Span(2, 4)),)))
    run = train(student, store, train="patch+norms")
    assert run.parameters == 5 * 48
    assert run.heldout(run.best_step) < run.heldout(0)


def test_the_losses_from_the_joint_are_those_of_the_whole_model(dense: PreTrainedModel, store: TeacherStore) -> None:
    student = student_of(dense)
    batch = store.batch([3, 4])
    with torch.no_grad():
        logits = student(batch.input_ids).logits.flatten(0, 1)
        state = student.model(batch.input_ids, output_hidden_states=True).hidden_states[2]
        found = SuffixLoss(student, 2)(state, batch.probs, batch.ids, LOSSES)
    probs, ids = batch.probs.flatten(0, 1), batch.ids.flatten(0, 1)
    for value, loss in zip(found, LOSSES, strict=True):
        target = probs / probs.sum(-1, keepdim=True) if loss == "topk" else probs
        torch.testing.assert_close(value, topk_kl_loss(logits, target, ids, normalization=loss))


def test_forms() -> None:
    hadamard = random_patch("hadamard")
    assert isinstance(hadamard, HadamardPatch)
    scale = HadamardPatch(48)
    with torch.no_grad():
        scale.scale.copy_(hadamard.scale)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(reformed(hadamard, "dense", 0)(x), hadamard(x), rtol=1e-4, atol=1e-4)
        chain = PatchChain(hadamard, random_patch("dense"))
        torch.testing.assert_close(reformed(chain, "dense", 0)(x), chain(x), rtol=1e-4, atol=1e-4)
        for form in ("scale", "scales", "low-rank", "dense"):
            torch.testing.assert_close(reformed(scale, form, 4)(x), scale(x), rtol=1e-4, atol=1e-4)
        near = reformed(random_patch("dense"), "low-rank", 8)
    assert near.description() == {"kind": "hadamard", "dim": 48, "rank": 8, "pre_scale": True, "post_scale": True}
    for form, rank in (("low-rank", 0), ("low-rank", 49), ("square", 4)):
        with pytest.raises(InputError):
            reformed(scale, form, rank)


@pytest.mark.parametrize("form", ["scale", "scales", "low-rank", "dense"])
def test_every_parameter_of_a_form_moves(dense: PreTrainedModel, store: TeacherStore, form: str) -> None:
    start = reformed(HadamardPatch(48), form, 4)
    student = student_of(dense, copy.deepcopy(start))
    settings = TrainingSettings(steps=8, learning_rate=3e-3)
    # On the windows it learns: this is not about what a text has in common with another.
    run = distill(student, store, joint=JOINT, training=TRAINING, heldout=TRAINING, settings=settings)
    assert run.best_step > 0
    for name, parameter in patches(student)[2][0].named_parameters():
        assert not torch.equal(parameter, dict(start.named_parameters())[name]), name


def test_prepare_and_release_lora(dense: PreTrainedModel) -> None:
    student = student_of(dense, DensePatch(48))
    names, before = list(student.state_dict()), state_of(student)
    trainable = prepare(student, 2, "lora", lora_rank=2, seed=0)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == set(trainable.parameters)
    assert {type(parameter) for parameter in trainable.parameters.values()} == {torch.nn.Parameter}
    assert len([name for name in trained if "lora_" in name]) == 2 * 2 * 7
    assert set(norm_gains(student, 2)) < trained
    trainable.release()
    assert list(student.state_dict()) == names
    assert changed(before, state_of(student)) == set()


@pytest.mark.parametrize("content", ["a diary\n", '{"day": 1}\n{"day": 2}\n', "[1]"])
def test_a_log_of_somebody_is_not_written_over(
    dense: PreTrainedModel, store: TeacherStore, tmp_path: Path, content: str
) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"log\.jsonl is no log of a training and in its way"):
        train(student_of(dense), store, tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == content


def test_a_log_that_was_cut_off_in_its_first_line_is_ours(
    dense: PreTrainedModel, store: TeacherStore, tmp_path: Path
) -> None:
    for content in ("", '{"st', '{"step": 1, "loss'):
        (tmp_path / "log.jsonl").write_text(content)
        train(student_of(dense), store, tmp_path)
        (tmp_path / "state.safetensors").unlink()
