"""What is computed again instead of kept: the same bits, less memory, and nothing stays behind."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from linearpatch_kernels.distillation.recompute import recomputing
from linearpatch_kernels.distillation.settings import RECOMPUTE
from linearpatch_kernels.distillation.teacher_store import TeacherStore
from linearpatch_kernels.distillation.trainer import TrainingSettings, distill
from linearpatch_kernels.modeling.families import decoder_layers, hidden_size
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.modeling.views import partial_decoder
from tests.support.students import HELDOUT, JOINT, TRAINING, student_of
from tests.support.tiny import FAMILY_NAMES, tiny_model


def activation_of(layer: Any) -> Any:
    return layer.mlp.activation_fn if hasattr(layer.mlp, "activation_fn") else layer.mlp.act_fn


class Pass:
    """A forward through the suffix and back: the gradient of the joint's patch, and what lived in between.

    Args:
        what: of `RECOMPUTE`; "" for the model as it is.
    """

    def __init__(self, student: PreTrainedModel, what: str) -> None:
        layers: list[Any] = list(decoder_layers(student)[JOINT:])
        suffix = partial_decoder(student, JOINT, JOINT + len(layers), norm=True)
        state = torch.randn(2, 7, hidden_size(student), generator=torch.Generator().manual_seed(1))
        outputs: list[StorageWeakRef] = []
        self.calls = 0

        def entered(*_: Any) -> None:
            self.calls += 1

        handles = [layer.mlp.register_forward_pre_hook(entered) for layer in layers]
        with recomputing(student, JOINT, what) if what else contextlib.nullcontext():
            for layer in layers:
                handles.append(activation_of(layer).register_forward_hook(lambda _m, _a, output: keep(outputs, output)))

            output = suffix(inputs_embeds=state, use_cache=False).last_hidden_state
            self.activations_alive = [not storage.expired() for storage in outputs]
            forward_calls, self.calls = self.calls, 0
            output.square().mean().backward()
        for handle in handles:
            handle.remove()
        assert forward_calls == len(layers)
        patch: Any = patches(student)[JOINT][0]
        self.gradient: Tensor = patch.weight.grad


def keep(storages: list[StorageWeakRef], tensor: Tensor) -> None:
    storages.append(StorageWeakRef(tensor.untyped_storage()))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_gradient_is_the_same_bits(family: str) -> None:
    dense = tiny_model(family)
    found = {}
    for what in RECOMPUTE:
        student = student_of(copy.deepcopy(dense)).requires_grad_(False)
        patches(student)[JOINT].requires_grad_(True)
        found[what] = Pass(student, what)
    stock = student_of(copy.deepcopy(dense)).requires_grad_(False)
    patches(stock)[JOINT].requires_grad_(True)
    assert torch.equal(found["none"].gradient, Pass(stock, "").gradient)
    assert float(found["none"].gradient.norm()) > 0
    for what in RECOMPUTE:
        assert torch.equal(found[what].gradient, found["none"].gradient)
    assert all(found["none"].activations_alive)
    assert not any(found["activation"].activations_alive + found["layer"].activations_alive)
    # Whole layers run twice, all others once.
    assert [found[what].calls for what in RECOMPUTE] == [0, 0, len(found["none"].activations_alive)]


@pytest.mark.parametrize("train", ["patch+norms", "lora"])
def test_a_run_ends_with_the_same_weights(dense: PreTrainedModel, store: TeacherStore, train: str) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    ended = {}
    for what in RECOMPUTE:
        student = student_of(dense)
        settings = TrainingSettings(steps=4, learning_rate=3e-3, train=train, micro_batch=2, recompute=what)
        distill(student, store, joint=JOINT, training=TRAINING, heldout=HELDOUT, settings=settings)
        ended[what] = student.state_dict()
    start = student_of(dense).state_dict()
    assert not torch.equal(ended["none"]["model.norm.weight"], start["model.norm.weight"])
    for what in RECOMPUTE:
        assert all(torch.equal(tensor, ended["none"][name]) for name, tensor in ended[what].items())


@pytest.mark.parametrize("what", RECOMPUTE)
def test_nothing_stays_behind(dense: PreTrainedModel, what: str) -> None:
    modules = [module for layer in decoder_layers(dense) for module in layer.modules()]

    def touched() -> list[nn.Module]:
        return [module for module in modules if "forward" in module.__dict__ or module._forward_hooks]

    def fail() -> None:
        with recomputing(dense, JOINT, what):
            assert touched()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not touched()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 48), (0, 48)])
def test_a_frozen_norm_is_the_stock_one(family: str, shape: tuple[int, ...]) -> None:
    model = tiny_model(family).requires_grad_(False)
    norm: Any = model.model.norm
    norm.weight.copy_(torch.rand(48) + 0.5)
    x = torch.randn(shape) * 3

    def run() -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        return y, *torch.autograd.grad(y, leaf, torch.linspace(-1, 2, y.numel()).view_as(y))

    stock = run()
    with recomputing(model, 5, "none"):
        assert ("forward" in norm.__dict__) == (family != "gemma3_text")  # whose gain is another formula's
        ours = run()
        half = norm(x.bfloat16())
    assert half.dtype == norm(x.bfloat16()).dtype
    assert all(torch.equal(one, other) for one, other in zip(ours, stock, strict=True))
    for bad in (float("nan"), float("inf")):
        if x.numel():
            x[..., 3] = bad
            stock = run()
            with recomputing(model, 5, "none"):
                ours = run()
            assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(ours, stock, strict=True))
