"""Models that are not what Transformers built: adapters, replaced modules, methods and hooks put on instances.

What was found: a model with a LoRA adapter (beside its weights, or by ``load_adapter``) was cut with status 0 into a
checkpoint that nothing can load (prime-rl #1707, cruijff_kit #495). Of a model whose modules have a ``forward`` bound
to them (Liger #279, #280, #772), the cut computed with the weights of the dense model, so that training it had no
effect. Here is every other way that was thought of in which a module can differ from the one in the twin's place.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import STOCK_FAMILIES, norm_gains
from linearpatch_kernels.modeling.fused_loss import fuse_distillation_loss
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.views import partial_decoder, suffix_model
from linearpatch_kernels.nn import LowRankPatch
from tests.support.field import IDS, same, tiny

FAMILIES = list(STOCK_FAMILIES)
KEPT = [0, 1, 4, 5]
ALL = range(6)


def cut(model: PreTrainedModel) -> PreTrainedModel:
    return patched_model(keep_layers(model, KEPT), {2: LowRankPatch(48, 2)})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(IDS).logits
    return out


def layer(model: PreTrainedModel, index: int = 1) -> Any:
    return model.model.layers[index]


# --- other parts or weights ------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class LoraLinear(nn.Linear):
    """A leaf with an adapter's weights in it, as loralib makes one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.lora_a, self.lora_b = nn.Parameter(torch.zeros(2, 48)), nn.Parameter(torch.zeros(base.out_features, 2))


class Int8Linear(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach().mul(100).to(torch.int8))
        self.register_buffer("scale", torch.tensor(0.01))


class Subclassed(Tensor):
    """What torchao and DTensor put in the place of a weight."""


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).save_pretrained(folder)
    model.load_adapter(str(folder))


def put(model: PreTrainedModel, path: str, module: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer(model).get_submodule(parent), name, module)


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "an adapter injected": lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["o_proj"])),
    "an adapter of a norm's": lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["embed_tokens"])),
    "an adapter in the leaf": lambda m: put(m, "mlp.gate_proj", LoraLinear(layer(m).mlp.gate_proj)),
    "a wrapper": lambda m: put(m, "mlp.gate_proj", Wrapper(layer(m).mlp.gate_proj)),
    "a wrapped mlp": lambda m: put(m, "mlp", Wrapper(layer(m).mlp)),
    "a wrapped layer": lambda m: m.model.layers.__setitem__(1, Wrapper(layer(m))),
    "a compiled layer": lambda m: m.model.layers.__setitem__(1, torch.compile(layer(m), backend="eager")),
    "a sequence": lambda m: put(m, "mlp.up_proj", nn.Sequential(layer(m).mlp.up_proj)),
    "eight bits": lambda m: put(m, "mlp.up_proj", Int8Linear(layer(m).mlp.up_proj)),
    "bits in a parameter": lambda m: setattr(
        layer(m).mlp.up_proj, "weight", nn.Parameter(layer(m).mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    ),
    "eight float bits": lambda m: layer(m).mlp.up_proj.to(torch.float8_e4m3fn),
    "a subclassed weight": lambda m: setattr(
        layer(m).mlp.up_proj,
        "weight",
        nn.Parameter(layer(m).mlp.up_proj.weight.detach().as_subclass(Subclassed), requires_grad=False),
    ),
    "dynamic quantisation": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
    "weight norm": lambda m: weight_norm(layer(m).mlp.up_proj),
    "weight norm, parametrised": lambda m: parametrizations.weight_norm(layer(m).mlp.up_proj),
    "spectral norm": lambda m: spectral_norm(layer(m).mlp.up_proj),
    "a pruning mask": lambda m: prune.l1_unstructured(layer(m).mlp.up_proj, "weight", 0.5),
    "a bias": lambda m: put(m, "mlp.down_proj", nn.Linear(80, 48)),
    "a bias of the head": lambda m: setattr(m, "lm_head", nn.Linear(48, 97)),
    "fewer neurons": lambda m: [
        put(m, "mlp.gate_proj", nn.Linear(48, 40, bias=False)),
        put(m, "mlp.up_proj", nn.Linear(48, 40, bias=False)),
        put(m, "mlp.down_proj", nn.Linear(40, 48, bias=False)),
    ],
    "no mlp": lambda m: put(m, "mlp", nn.Identity()),
    "a part more": lambda m: put(m, "adapter", nn.Linear(48, 48)),
    "a part more of the model": lambda m: setattr(m, "v_head", nn.Linear(48, 1)),
    "a parameter more": lambda m: setattr(layer(m), "gate", nn.Parameter(torch.ones(1))),
    "a buffer more": lambda m: layer(m).mlp.up_proj.register_buffer("mask", torch.ones(80, 48)),
    "other mathematics in place of a projection": lambda m: put(m, "mlp.up_proj", Twice(layer(m).mlp.up_proj)),
    "other mathematics in place of an mlp": lambda m: setattr(layer(m).mlp, "__class__", TwiceMLP),
    "another activation": lambda m: put(m, "mlp.act_fn", nn.ReLU()),
    "another rotary embedding": lambda m: setattr(m.model.rotary_emb, "__class__", SlowRotary),
    "another norm": lambda m: put(m, "input_layernorm", RMSNorm(layer(m).input_layernorm, eps=0.1)),
    "another head": lambda m: setattr(m, "lm_head", Twice(m.lm_head)),
}


class Twice(nn.Linear):
    """A projection that computes something else with the same weights, as a fake-quantised one does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


_LlamaMLP = type(layer(tiny(layers=2)).mlp)
_LlamaRotary = type(tiny(layers=2).model.rotary_emb)


class TwiceMLP(_LlamaMLP):  # type: ignore[valid-type,misc]
    def forward(self, x: Tensor) -> Any:
        return 2 * super().forward(x)


class SameMLP(_LlamaMLP):  # type: ignore[valid-type,misc]
    """Another class with the same mathematics, as Liger's."""

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class SlowRotary(_LlamaRotary):  # type: ignore[valid-type,misc]
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(x, position_ids // 2)


class RMSNorm(nn.Module):
    """A norm of another library, with the same weight."""

    def __init__(self, stock: Any, eps: float | None = None) -> None:
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon if eps is None else eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class BuiltRMSNorm(RMSNorm):
    """With the constructor that Transformers calls."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(types.SimpleNamespace(weight=nn.Parameter(torch.ones(width)), variance_epsilon=eps))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_that_is_not_what_transformers_builds_is_refused(change: Callable[[PreTrainedModel], Any]) -> None:
    model = tiny()
    change(model)
    # A cut that removes nothing, too: it is the same model that would be saved.
    for made in (lambda: keep_layers(model, KEPT), lambda: keep_layers(model, ALL), lambda: patched_model(model, {})):
        with pytest.raises(InputError, match=r"first|full precision") as refused:
            made()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["load_adapter", "in a part that is removed"])
def test_an_adapter_that_was_loaded_is_refused_and_what_lies_in_removed_layers_is_not(
    kind: str, tmp_path: Path
) -> None:
    model = tiny()
    if kind == "load_adapter":
        load_adapter(model, tmp_path)
        with pytest.raises(InputError, match=r"layers\.0\..*a Linear that has base_layer: merge or unload the adapter"):
            keep_layers(model, KEPT)
    else:
        expected = logits(keep_layers(tiny(), KEPT))
        setattr(layer(model, 2), "mlp", nn.Identity())  # noqa: B010 - mypy knows the attribute as a module
        assert torch.equal(logits(keep_layers(model, KEPT)), expected)


def test_a_merged_adapter_is_a_part_of_the_model() -> None:
    adapted = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = logits(adapted.eval())
    assert same(logits(keep_layers(adapted.merge_and_unload(), ALL)), expected)


def test_a_module_that_stands_in_two_places_stands_in_both_of_the_result() -> None:
    """Self-merges repeat the layers' modules; ``named_modules`` names each once, and the rest stayed on meta."""
    model = tiny()
    layer(model, 4).mlp = layer(model, 1).mlp
    layer(model, 5).input_layernorm = layer(model, 0).input_layernorm
    assert torch.equal(logits(keep_layers(model, ALL)), logits(model))
    made = keep_layers(model, [1, 4])
    assert not any(parameter.is_meta for parameter in made.parameters())
    assert layer(made, 0).mlp is not layer(made, 1).mlp


@pytest.mark.parametrize("replaced", ["norms", "mlps"])
def test_modules_of_another_class_that_compute_the_same_go_on(replaced: str) -> None:
    """Norms and MLPs of other libraries have the stock weights and compute the stock mathematics."""
    model = tiny()
    expected = logits(keep_layers(model, KEPT))
    for module in list(model.model.layers):
        if replaced == "norms":
            module.input_layernorm = RMSNorm(module.input_layernorm)
        else:
            module.mlp.__class__ = SameMLP
    made = keep_layers(model, KEPT)
    assert same(logits(made), expected)
    assert not made.training
    if replaced == "norms":
        assert isinstance(layer(made).input_layernorm, RMSNorm)
        assert len(norm_gains(made, 0)) == 9
    assert same(logits(patched_model(model, {})), logits(model))


def test_classes_that_were_replaced_in_transformers_after_the_model_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger on a model replaces Transformers' classes, and on the instances, built before, the methods."""
    model = tiny()
    expected = logits(keep_layers(model, KEPT))
    for module in model.modules():
        if isinstance(module, _LlamaMLP):
            module.forward = types.MethodType(SameMLP.forward, module)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", SameMLP)
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", BuiltRMSNorm)
    made = keep_layers(model, KEPT)
    assert isinstance(layer(made).mlp, SameMLP)
    assert same(logits(made), expected)
    for one in made.model.layers:
        one.mlp.down_proj.weight = nn.Parameter(torch.zeros(48, 80))
    assert not same(logits(made), expected)


# --- methods and hooks on instances ----------------------------------------------------------------------------------


def class_forward(module: Any) -> Any:
    return type(module).forward


class Caller:
    """A callable that holds a module, in a slot."""

    __slots__ = ("module",)

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return class_forward(self.module)(self.module, *args, **kwargs)


def by_attribute(module: Any) -> None:
    """As accelerate and Unsloth do: the old method is kept, and the new one calls it."""
    module.before = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: self.before(*args, **kwargs), module)


def by_reference(module: Any) -> None:
    module.reference = weakref.ref(module)
    module.forward = types.MethodType(lambda self, *a, **k: class_forward(self)(self.reference(), *a, **k), module)


def by_proxy(module: Any) -> None:
    vars(module)["proxy"] = weakref.proxy(module)
    module.forward = types.MethodType(
        lambda self, *a, **k: class_forward(self)(self.proxy.__repr__.__self__, *a, **k), module
    )


def by_list(module: Any) -> None:
    module.kept = {"all": [(module, 1)]}
    module.forward = types.MethodType(
        lambda self, *a, **k: class_forward(self)(self.kept["all"][0][0], *a, **k), module
    )


BOUND: dict[str, Callable[[Any], None]] = {
    "a bound method": lambda module: setattr(module, "forward", types.MethodType(class_forward(module), module)),
    "a partial": lambda module: setattr(module, "forward", functools.partial(class_forward(module), module)),
    "a partial of a method": lambda module: setattr(module, "forward", functools.partial(module.forward)),
    "an attribute": by_attribute,
    "a weak reference": by_reference,
    "a weak proxy": by_proxy,
    "a list": by_list,
}
PLACES = ("RMSNorm", "Linear", "MLP", "Attention", "DecoderLayer", "Embedding", "Model", "ForCausalLM")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("put_on", BOUND.values(), ids=BOUND)
def test_a_cut_model_computes_with_its_own_weights(family: str, put_on: Callable[[Any], None]) -> None:
    plain, touched = tiny(family), tiny(family)
    for module in touched.modules():
        if type(module).__name__.endswith(PLACES):
            put_on(module)
    made = [keep_layers(model, KEPT) for model in (plain, touched)]
    for one in made:
        inner = layer(one, 2)
        inner.input_layernorm.weight = nn.Parameter(3 * inner.input_layernorm.weight.detach())
        inner.self_attn.o_proj.weight = nn.Parameter(-2 * inner.self_attn.o_proj.weight.detach())
        one.lm_head.weight = nn.Parameter(2 * one.lm_head.weight.detach())
    assert not same(logits(made[0]), logits(keep_layers(plain, KEPT)))
    assert same(*map(logits, made))


def closure(module: Any) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)


def default(module: Any) -> None:
    module.forward = lambda x, source=module: class_forward(source)(source, x)


def weight(module: Any) -> None:
    module.forward = functools.partial(nn.functional.linear, weight=module.weight)


def foreign(module: Any) -> None:
    module.forward = Wrapper(nn.Sequential(module.__class__(48, 80), _forwarding(module))).forward


def _forwarding(module: Any) -> Any:
    holder = nn.Module()
    holder.__dict__["source"] = [module]
    return holder


def hook(module: Any) -> None:
    module.register_forward_hook(lambda _, args, out, source=module: nn.functional.linear(args[0], source.weight))


def pre_hook(module: Any) -> None:
    module.register_forward_pre_hook(lambda _, args: (args[0] + 0 * module.weight.sum(),))


HELD: dict[str, Callable[[Any], None]] = {
    "a closure": closure,
    "a default": default,
    "a weight": weight,
    "an object": lambda module: setattr(module, "forward", Caller(module)),
    "a partial of an object": lambda module: setattr(module, "forward", functools.partial(Caller(module))),
    "a module outside": foreign,
    "compiled": lambda module: setattr(module, "forward", torch.compile(module.forward, backend="eager")),
    "a hook": hook,
    "a pre-hook": pre_hook,
}


@pytest.mark.parametrize("held_by", HELD.values(), ids=HELD)
def test_what_cannot_be_bound_to_the_copy_is_refused(held_by: Callable[[Any], None]) -> None:
    model = tiny()
    held_by(layer(model).mlp.up_proj)
    with pytest.raises(InputError, match=r"(forward|hook) that was put on model\.layers\.1\.mlp\.up_proj holds") as no:
        keep_layers(model, KEPT)
    assert "\n" not in str(no.value)


def test_what_is_bound_to_a_layer_that_is_gone_is_refused() -> None:
    model = tiny()
    layer(model, 1).mlp.forward = layer(model, 2).mlp.forward
    assert torch.equal(logits(keep_layers(model, ALL)), logits(model))
    with pytest.raises(InputError, match="undo what put it there first"):
        keep_layers(model, KEPT)


def test_other_attributes_that_hold_the_model_are_left_behind() -> None:
    model = tiny()
    model.note = lambda: model
    layer(model).mlp.note = Caller(model)
    made = keep_layers(model, KEPT)
    assert not hasattr(made, "note")
    assert not hasattr(layer(made).mlp, "note")
    assert hasattr(model, "note")


def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
    return output + 0.5


def doubled(module: Any) -> None:
    module.forward = types.MethodType(lambda self, *args: 2 * class_forward(self)(self, *args), module)


MEANT: dict[str, Callable[[PreTrainedModel], Any]] = {
    "mlp.forward": lambda m: doubled(layer(m).mlp),
    "norm.forward": lambda m: doubled(m.model.norm),
    "a hook of a layer": lambda m: layer(m).register_forward_hook(steer),
    "a hook of an mlp": lambda m: layer(m).mlp.register_forward_hook(steer),
    "a hook of a leaf": lambda m: m.model.norm.register_forward_hook(steer),
    "a hook with keywords": lambda m: layer(m).register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    ),
    "a hook of the decoder": lambda m: m.model.register_forward_hook(
        lambda _, args, out: type(out)(last_hidden_state=out[0] * 2)
    ),
    "is_causal": lambda m: setattr(layer(m).self_attn, "is_causal", False),
    "scaling": lambda m: setattr(layer(m).self_attn, "scaling", 1.0),
    "eps": lambda m: setattr(layer(m).input_layernorm, "variance_epsilon", 1.0),
}


@pytest.mark.parametrize("change", MEANT.values(), ids=MEANT)
def test_what_was_meant_to_change_the_model_changes_the_cut_one(change: Callable[[PreTrainedModel], Any]) -> None:
    model = tiny()
    before = logits(model)
    change(model)
    after = logits(model)
    made = keep_layers(model, ALL)
    assert torch.equal(logits(made), after)
    assert torch.equal(logits(patched_model(model, {2: LowRankPatch(48, 2)})), after)
    for one in made.modules():
        one._forward_hooks.clear()
    assert torch.equal(logits(model), after)
    assert not torch.equal(before, after)


def test_a_method_of_a_stock_layer_does_not_run_in_place_of_the_patch() -> None:
    model = tiny()
    BOUND["a bound method"](layer(model, 2))
    assert torch.equal(logits(patched_model(model, {1: LowRankPatch(48, 2)})), logits(model))
    with pytest.raises(InputError, match=r"forward that was put on model\.layers\.2 would run in the place of the pat"):
        patched_model(model, {2: LowRankPatch(48, 2)})


@pytest.mark.parametrize("put_on", BOUND.values(), ids=BOUND)
@torch.no_grad()
def test_a_view_runs_its_own_layers(put_on: Callable[[Any], None]) -> None:
    model = tiny()
    stream = 0.1 * torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    parts: list[Callable[[], Tensor]] = [
        lambda: partial_decoder(model, 2, 4)(inputs_embeds=stream).last_hidden_state,
        lambda: suffix_model(model, 4)(inputs_embeds=stream).logits,
    ]
    expected = [part() for part in parts]
    whole = logits(model)
    for module in (model, model.model):
        put_on(module)
    assert all(torch.equal(part(), wanted) for part, wanted in zip(parts, expected, strict=True))
    assert torch.equal(logits(model), whole)


def test_a_view_of_a_model_whose_forward_holds_it_is_refused() -> None:
    model = tiny()
    undo = fuse_distillation_loss(model)
    with pytest.raises(InputError, match="the forward that was put on the model holds this very model"):
        suffix_model(model, 3)
    with pytest.raises(InputError, match="the forward that was put on the model holds this very model"):
        keep_layers(model, KEPT)
    partial_decoder(model, 1, 3)
    undo()
    suffix_model(model, 3)
    closure(model.model)
    with pytest.raises(InputError, match="the forward that was put on the decoder holds"):
        partial_decoder(model, 1, 3)
