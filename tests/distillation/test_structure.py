"""A trained dense patch becomes Hadamard + rank r: nearest for what flows through it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.distillation.structure import input_moments, structure
from linearpatch_kernels.distillation.teacher_store import TeacherStore
from linearpatch_kernels.distillation.trainer import heldout_losses
from linearpatch_kernels.forward import residual_stream
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import DensePatch, HadamardPatch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from tests.support.students import HELDOUT, JOINT, TRAINING, student_of
from tests.support.tiny import random_patch, tiny_model


def test_moments_are_those_of_the_stream_at_the_joint(
    dense: PreTrainedModel, store: TeacherStore, windows: Tensor
) -> None:
    student = student_of(dense)
    patch = patches(student)[JOINT]
    found = input_moments(student, store, patch, joint=JOINT, windows=TRAINING)
    with torch.no_grad():
        x = residual_stream(dense, windows[: len(TRAINING)], [JOINT])[JOINT].flatten(0, 1).double()
        unit = x / patch(x).norm(dim=-1, keepdim=True)
    wanted = unit.T @ unit
    wanted += 1e-4 * wanted.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_later_patch_sees_what_the_earlier_one_leaves(store: TeacherStore, windows: Tensor) -> None:
    plan = PrunePlan(6, tuple(Joint(span, random_patch("dense"), "test") for span in (Span(2, 3), Span(4, 5))))
    student = apply_plan(tiny_model("llama"), plan)
    found = input_moments(student, store, patches(student)[3], joint=2, windows=[0])
    with torch.no_grad():
        x = residual_stream(student, windows[:1], [3])[3].flatten(0, 1).double()
        unit = x / patches(student)[3](x).norm(dim=-1, keepdim=True)
    wanted = unit.T @ unit
    wanted += 1e-4 * wanted.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_it_is_nearer_than_the_nearest_matrix(dense: PreTrainedModel, store: TeacherStore) -> None:
    student = student_of(dense)
    patch = patches(student)[JOINT]
    assert [type(one) for one in patch] == [DensePatch]
    moments = input_moments(student, store, patch, joint=JOINT, windows=TRAINING)
    structure(student, store, joint=JOINT, windows=TRAINING, dense={JOINT: patch}, rank=4)
    found = patches(student)[JOINT]
    assert found.description() == [HadamardPatch(48, 4).description()]
    rests = [patch.to_dense() - near.to_dense() for near in (found, HadamardPatch.from_dense(patch.to_dense(), 4))]
    weighted, plain = (float((rest.T @ moments @ rest).trace()) for rest in rests)
    assert weighted < 0.98 * plain


def test_nothing_is_lost_where_there_is_nothing_to_lose(dense: PreTrainedModel, store: TeacherStore) -> None:
    same = HadamardPatch(48, 2)
    with torch.no_grad():
        same.scale.uniform_(0.5, 1.5)
        same.up.normal_(std=0.1)
    student = student_of(dense, DensePatch.from_dense(same.to_dense()))
    before = heldout_losses(student, store, JOINT, HELDOUT)["tail"]
    structure(student, store, joint=JOINT, windows=TRAINING, dense=dict(patches(student)), rank=2)
    after = heldout_losses(student, store, JOINT, HELDOUT)["tail"]
    assert abs(after - before) < 1e-3 * before
