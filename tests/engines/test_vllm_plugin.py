"""The vLLM plug-in without vLLM: what it registers, what it says, where patches go, and which weights it takes.

A stand-in has the few names of vLLM's that the plug-in uses. The real one runs in test_vllm.py.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearpatch_kernels.engines.vllm as plugin
from linearpatch_kernels.engines.vllm.layer import form_of, patched_layer
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import text_config
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.nn import PatchChain
from tests.support.tiny import random_patch, tiny_model, tiny_patched_model

ROOT = Path(__file__).parents[2]
WIDTH = 8


class Norm(nn.Module):
    """As vLLM's fused norm: of one tensor, or of two, of which it returns the sum as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        whole = hidden if residual is None else hidden + residual
        normed = nn.functional.rms_norm(whole, (WIDTH,), self.weight)
        return normed if residual is None else (normed, whole)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(), nn.Linear(WIDTH, WIDTH)


class SumLayer(Layer):
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual, hidden_states = hidden_states, self.norm(hidden_states)
        else:
            hidden_states, residual = self.norm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class FirstLayer(Layer):
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        return hidden_states + self.mlp(self.norm(hidden_states)), hidden_states


class OneLayer(Layer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


class PairLayer(Layer):
    def forward(self, hidden_states: Tensor) -> Any:
        written, _ = self.mlp(self.norm(hidden_states)), None
        return hidden_states + written, hidden_states


class HalvedLayer(Layer):
    """The stream is neither of the two tensors nor their sum."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> Any:
        whole = hidden_states if residual is None else hidden_states + residual
        whole = whole + self.mlp(self.norm(whole))
        return whole / 2, whole / 4


class TransposedLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x.T


class NamelessLayer(Layer):
    def forward(self, rows: Tensor) -> Tensor:
        return rows


def stream(output: Any, is_sum: bool) -> Tensor:
    head: Tensor = output[0] if type(output) is tuple else output
    return head + output[1] if is_sum else head


@pytest.mark.parametrize(
    ("kind", "is_sum"), [(SumLayer, True), (FirstLayer, False), (OneLayer, False), (PairLayer, False)]
)
def test_a_patched_layer_maps_the_stream_in_front_and_behind(kind: type[Layer], is_sum: bool) -> None:
    torch.manual_seed(0)
    layer: Any = kind()
    first, second = torch.randn(2, 5, WIDTH)
    takes_two = kind in (SumLayer, FirstLayer)
    positions = (torch.arange(5),) if takes_two else ()
    chains = [PatchChain(random_patch(one, dim=WIDTH)) for one in ("dense", "norm-linear")]
    entering = first + second if is_sum else first
    with torch.no_grad():
        rest = (None,) if takes_two else ()
        expected = chains[1](stream(layer(*positions, chains[0](entering), *rest), is_sum))
    assert form_of(layer, WIDTH).is_sum is is_sum
    layer.__class__ = patched_layer(layer, WIDTH)
    layer.patch, layer.output_patch = chains
    with torch.no_grad():
        found = layer(*positions, first, *((second,) if takes_two else ()))
        torch.testing.assert_close(stream(found, is_sum), expected)
        # Only in front, and by names.
        layer.output_patch = None
        named = {"hidden_states": first, **({"residual": second} if takes_two else {})}
        named |= {"positions": positions[0]} if positions else {}
        torch.testing.assert_close(chains[1](stream(layer(**named), is_sum)), expected)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (HalvedLayer, "it does not return the stream"),
        (TransposedLayer, "it does not return the stream"),
        (NamelessLayer, "takes rows"),
    ],
)
def test_a_layer_of_another_form_is_refused(kind: type[Layer], why: str) -> None:
    with pytest.raises(
        InputError, match=f"{kind.__name__} passes the residual stream on is not known .*{why}.*model-impl"
    ):
        form_of(kind(), WIDTH)


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    layer: Any = OneLayer()
    layer.forward = lambda hidden_states: hidden_states
    with pytest.raises(InputError, match="without weight offloading"):
        patched_layer(layer, WIDTH)


class Registry:
    """vLLM's, as far as the plug-in asks it."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {"LlamaForCausalLM": None, "GPT2LMHeadModel": None, "BertModel": None}

    def get_supported_archs(self) -> Any:
        return self.models.keys()

    def register_model(self, name: str, place: str) -> None:
        self.models[name] = place


class PPMissingLayer(nn.Module):
    pass


def load(parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.data.copy_(tensor)


class ConfigParser:
    """Reads a config as Transformers does."""

    asked: list[bool] = []  # noqa: RUF012 - which of the calls were allowed to run a checkpoint's code

    def parse(self, model: Any, trust_remote_code: bool, **_: Any) -> Any:
        from transformers import AutoConfig, PretrainedConfig

        self.asked.append(trust_remote_code)
        return PretrainedConfig.get_config_dict(model)[0], AutoConfig.from_pretrained(model)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A stand-in for vLLM in `sys.modules`."""
    parsers: dict[str, type] = {"hf": ConfigParser}
    registry, settings = Registry(), {"LlamaForCausalLM": "what vLLM changes"}
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": f"{plugin.TESTED[0]}.0"},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {"ModelRegistry": registry},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": settings},
        "vllm.model_executor.models.utils": {"PPMissingLayer": PPMissingLayer},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.weight_utils": {"default_weight_loader": load},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.config": {
            "get_config_parser": lambda kind: parsers[kind](),
            "register_config_parser": lambda kind: lambda parser: parsers.update({kind: parser}),
        },
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module, raising=False)
    yield types.SimpleNamespace(registry=registry, parsers=parsers, settings=settings, module=sys.modules["vllm"])
    # Made with the stand-in.
    for name in ("config", "model"):
        sys.modules.pop(f"{plugin.__name__}.{name}", None)
        vars(plugin).pop(name, None)


def test_it_registers_names_and_nothing_twice(vllm: Any) -> None:
    plugin.register()
    plugin.register()
    twins = {name: place for name, place in vllm.registry.models.items() if place is not None}
    place = "linearpatch_kernels.engines.vllm.model:"
    assert twins == {
        "LinearPatchLlamaForCausalLM": f"{place}LinearPatchLlamaForCausalLM",
        "LinearPatchGPT2LMHeadModel": f"{place}LinearPatchGPT2LMHeadModel",
    }
    reader = vllm.parsers["hf"]
    assert reader.__mro__[1] is ConfigParser


def test_vllm_finds_it_by_its_entry_point() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"vllm.general_plugins": {"linearpatch": "linearpatch_kernels.engines.vllm:register"}}
    point = importlib.metadata.EntryPoint(
        "linearpatch", *points["vllm.general_plugins"].values(), "vllm.general_plugins"
    )
    assert point.load() is plugin.register


def test_every_process_of_vllm_imports_next_to_nothing() -> None:
    program = "import sys, linearpatch_kernels.engines.vllm; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "transformers", "vllm", "numpy"} & set(run.stdout.split())


def test_another_vllm_is_named(vllm: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert plugin.untested() is None
    assert plugin.untested("0.320.1") == "linearpatch-kernels was tested with vLLM 0.32.x, not 0.320.1"
    # One that lacks what the plug-in needs must go on serving other models.
    del sys.modules["vllm.model_executor.models"].ModelRegistry  # type: ignore[attr-defined]  # the stand-in
    vllm.module.__version__ = "0.11.0"
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert len(record.getMessage().splitlines()) == 1
    assert "tested with vLLM 0.32.x, not 0.11.0" in record.getMessage()


def test_the_config_is_the_stock_models_with_the_joints(
    vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patched, stock = tiny_patched_model("llama"), tiny_model("llama")
    save_checkpoint(patched, None, tmp_path / "patched")
    save_checkpoint(stock, None, tmp_path / "stock")
    plugin.register()
    ConfigParser.asked.clear()
    parser = vllm.parsers["hf"]()
    _, found = parser.parse(tmp_path / "patched", trust_remote_code=True)
    assert type(found) is type(stock.config)
    assert found.model_type == "llama"
    assert found.hidden_act == "silu"
    assert found.architectures == ["LinearPatchLlamaForCausalLM"]
    assert found.linearpatch == patched.config.linearpatch
    entries, expected = found.to_dict(), stock.config.to_dict()
    differs = {name for name in expected if entries[name] != expected[name]}
    assert differs == {"_name_or_path", "architectures", "num_hidden_layers"}
    assert vllm.settings["LinearPatchLlamaForCausalLM"] == "what vLLM changes"
    _, other = parser.parse(tmp_path / "stock", trust_remote_code=True)
    assert not hasattr(other, "linearpatch")
    # The checkpoint's own code is not run where the plug-in knows the model; another model's is vLLM's affair.
    assert ConfigParser.asked == [False, True]
    assert not caplog.records
    vllm.module.__version__ = "1.0.0"
    for _ in range(2):
        parser.parse(tmp_path / "patched", trust_remote_code=False)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"{plugin.untested('1.0.0')}: compare")


class Decoder(nn.Module):
    """As in vLLM: layers of other processes are placeholders."""

    def __init__(self, depth: int, here: range) -> None:
        super().__init__()
        self.start_layer, self.end_layer = here.start, here.stop
        self.layers = nn.ModuleList(OneLayer() if index in here else PPMissingLayer() for index in range(depth))
        self.picture = nn.Module()
        self.picture.blocks = nn.ModuleList(OneLayer() for _ in range(depth))


class CausalLM(nn.Module):
    here = range(4)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.model = Decoder(text_config(vllm_config.model_config.hf_config).num_hidden_layers, self.here)
        self.others: list[str] = []

    def load_weights(self, weights: Any) -> set[str]:
        self.others = [name for name, _ in weights]
        return set(self.others)


class SecondHalf(CausalLM):
    here = range(2, 4)


@pytest.fixture
def served(vllm: Any) -> Any:
    """A function that makes the patched twin of a class of models, by a record of joints."""
    model = importlib.import_module("linearpatch_kernels.engines.vllm.model")
    hidden = {"num_hidden_layers": 4, "hidden_size": WIDTH}
    joints = {
        "1": [random_patch("diagonal", dim=WIDTH).description()],
        "2": [random_patch(kind, dim=WIDTH).description() for kind in ("dense", "low-rank")],
        "4": [random_patch("dense", dim=WIDTH).description()],
    }

    def make(stock: type, **changes: Any) -> Any:
        vllm.registry.models["StandInForCausalLM"] = types.SimpleNamespace(load_model_cls=lambda: stock)
        config = types.SimpleNamespace(linearpatch={"format": 2, "joints": joints}, **{**hidden, **changes})
        model.twin.cache_clear()
        twin = model.LinearPatchStandInForCausalLM
        assert issubclass(twin, stock)
        return twin(vllm_config=types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=config)))

    return make


def weights_of(model: Any) -> dict[str, Tensor]:
    patches = {name: one for name, one in model.named_parameters() if "patch." in name}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(one.shape, generator=generator) for name, one in patches.items()}


def test_weights_go_to_the_patches_and_the_others_to_vllm(served: Any) -> None:
    model = served(CausalLM)
    weights = weights_of(model)
    assert sorted(weights) == [
        "model.layers.1.patch.0.scale",
        "model.layers.2.patch.0.weight",
        "model.layers.2.patch.1.down",
        "model.layers.2.patch.1.up",
        "model.layers.3.output_patch.0.weight",
    ]
    other = {"model.layers.1.mlp.weight": torch.ones(1)}
    assert model.load_weights({**other, **weights}.items()) == {*weights, *other}
    assert model.others == [*other]
    state = model.state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value)
    # What trains a model beside vLLM sends some weights again.
    model.load_weights({"model.layers.1.patch.0.scale": torch.zeros(WIDTH)}.items())
    assert not model.state_dict()["model.layers.1.patch.0.scale"].any()
    with torch.no_grad():
        rows = torch.randn(3, WIDTH)
        expected = rows
        for layer in model.model.layers:
            expected = layer(expected)
    assert not torch.allclose(rows, expected)


def test_a_process_takes_the_patches_of_its_layers(served: Any) -> None:
    """Layers 2 and 3 are here: the joint in front of layer 2 is, too, and that behind the last layer."""
    everything = weights_of(served(CausalLM))
    model = served(SecondHalf)
    names = [name for name in everything if ".layers.1." not in name]
    assert sorted(weights_of(model)) == sorted(names)
    assert model.load_weights(everything.items()) == set(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.2.patch.1.up": None}, r"missing \(model\.layers\.2\.patch\.1\.up\)"),
        ({"model.layers.3.patch.0.weight": torch.eye(WIDTH)}, r"no patch has model\.layers\.3\.patch\.0\.weight"),
        ({"model.layers.1.patch.1.scale": torch.ones(WIDTH)}, r"no patch has model\.layers\.1\.patch\.1\.scale"),
        ({"model.layers.1.patch.0.scale": torch.ones(1)}, r"patch\.0\.scale is \[1\], not \[8\]"),
    ],
    ids=["missing", "another joint", "another patch", "another shape"],
)
@pytest.mark.parametrize("stock", [CausalLM, SecondHalf])
def test_weights_that_do_not_fit_are_refused(served: Any, stock: type, change: dict[str, Any], message: str) -> None:
    weights = {**weights_of(served(CausalLM)), **change}
    model = served(stock)
    if stock is SecondHalf and "is \\[1\\]" in message:
        # Its process does not have it, and looks at no more than the name.
        model.load_weights(weights.items())
        return
    with pytest.raises(InputError, match=message):
        model.load_weights((name, value) for name, value in weights.items() if value is not None)


def test_a_model_whose_layers_are_not_found_is_refused(served: Any) -> None:
    with pytest.raises(InputError, match="0 lists of modules that could be its 5 layers"):
        served(type("Shallow", (CausalLM,), {"__init__": shallow}), num_hidden_layers=5)


def shallow(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
    nn.Module.__init__(self)
    self.model = Decoder(3, range(3))


def test_names_that_are_no_architecture(vllm: Any) -> None:
    model = importlib.import_module("linearpatch_kernels.engines.vllm.model")
    for name in ("LinearPatchNothing", "LlamaForCausalLM"):
        with pytest.raises(AttributeError, match=name):
            getattr(model, name)
