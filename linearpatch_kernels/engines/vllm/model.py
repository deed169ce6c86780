"""vLLM's own models with patches at their joints.

``LinearPatch<architecture>`` of this module is a subclass of vLLM's class of that architecture. vLLM's constructor
builds the model, then the layers at the joints get their patches. So quantisation, LoRA, tensor and pipeline
parallelism are vLLM's own. A patch has the model's dtype, and is whole in every process that has its layer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer

from linearpatch_kernels.engines.vllm import PREFIX
from linearpatch_kernels.engines.vllm.layer import patched_layer
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import depth_of, text_config
from linearpatch_kernels.modeling.patched import build_joint, checked_record, joint_place, present_name
from linearpatch_kernels.nn import PatchChain

# The tensor of a patch, behind whatever a model calls its list of layers.
_PATCH_TENSOR = re.compile(r"(?:^|\.)(\d+)\.((?:output_)?patch)\.(\d+\.\w+)$")


def __getattr__(name: str) -> Any:
    # vLLM asks for the class by the name under which the plug-in registered it.
    architecture = name.removeprefix(PREFIX)
    if architecture != name and architecture in ModelRegistry.models:
        return twin(architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def twin(architecture: str) -> type[nn.Module]:
    """The subclass of vLLM's class of a stock architecture that has patches at the joints of its config."""
    stock: Any = ModelRegistry.models[architecture].load_model_cls()

    class Model(stock):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self.patch_weights = attach(self, vllm_config.model_config.hf_config)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
            others: set[str] | None = super().load_weights(self.patch_weights.load_from(weights))
            self.patch_weights.check_complete()
            return None if others is None else others | self.patch_weights.names_here()

    Model.__name__ = Model.__qualname__ = PREFIX + stock.__name__
    Model.__module__ = __name__
    return Model


def attach(model: nn.Module, config: Any) -> PatchWeights:
    """Put the joints of a config at the layers of a model that vLLM has just built from it.

    Raises:
        InputError: the record does not fit the model; its layers are not found, or pass the residual stream on in a way
            that is not known.
    """
    depth, width = depth_of(config), text_config(config).hidden_size
    joints = checked_record(getattr(config, "linearpatch", None), depth, width)["joints"]
    path, layers = decoder_layers(model, depth)
    found = PatchWeights()
    for joint, descriptions in joints.items():
        index, name = joint_place(int(joint), depth)
        layer: Any = layers[index]
        if not descriptions:
            continue
        place = f"{index}.{name}"
        if isinstance(layer, PPMissingLayer):
            # Another process has it, and reads its tensors. Their names are all that is needed here.
            with torch.device("meta"):
                found.add(place, build_joint(descriptions, width))
            continue
        chain = build_joint(descriptions, width)
        if not hasattr(layer, "stock_class"):
            layer.__class__ = patched_layer(layer, width)
            layer.register_module("patch", None)
            layer.register_module("output_patch", None)
        layer.register_module(name, chain)
        found.add(place, chain, f"{path}.{place}")
    return found


def decoder_layers(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    """The list of the decoder's layers in a model of vLLM, and its path: a list of ``depth`` modules.

    vLLM keeps beside it where the layers of this process begin and end, in contrast to those of what reads pictures.
    """
    lists = [
        (f"{path}.{name}".lstrip("."), child, hasattr(holder, "start_layer"))
        for path, holder in model.named_modules()
        for name, child in holder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    decoders = [one for one in lists if one[2]] or lists
    if len(decoders) != 1:
        raise InputError(
            f"vLLM's {type(model).__name__} holds {len(decoders)} lists of modules that could be its {depth} layers, "
            "and one is needed: serve the checkpoint with --model-impl transformers --trust-remote-code"
        )
    return decoders[0][0], decoders[0][1]


@dataclass
class PatchWeights:
    """The tensors of all patches of a model: those that this process has, and the names of the others."""

    here: dict[str, tuple[str, nn.Parameter]] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)

    def add(self, place: str, chain: PatchChain | None, path: str | None = None) -> None:
        """A chain at ``<layer>.<patch or output_patch>``, and its path in this process's model."""
        for name, parameter in chain.named_parameters() if chain is not None else ():
            if path is None:
                self.elsewhere.add(f"{place}.{name}")
            else:
                self.here[f"{place}.{name}"] = (f"{path}.{name}", parameter)

    def load_from(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Load the patches out of a checkpoint's tensors, and pass on all others.

        vLLM's loaders do not see the patches: they map names by their parts, and ``scale`` is a part of many.

        Raises:
            InputError: a tensor that no patch of the config has, or of another shape.
        """
        for name, tensor in weights:
            match = _PATCH_TENSOR.search(present_name(name))
            if match is None:
                yield name, tensor
                continue
            own = ".".join(match.groups())
            if own in self.here:
                parameter = self.here[own][1]
                if parameter.shape != tensor.shape:
                    raise InputError(
                        f"the patch weights do not fit the config ({name} is {list(tensor.shape)}, not "
                        f"{list(parameter.shape)}): the checkpoint is incomplete or mixed"
                    )
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
                self.loaded.add(own)
            elif own not in self.elsewhere:
                raise InputError(
                    f"the patch weights do not fit the config (no patch has {name}): the checkpoint is mixed"
                )

    def check_complete(self) -> None:
        """InputError where a tensor of a patch was never loaded. Some may be loaded again later, without the others."""
        missing = sorted(path for own, (path, _) in self.here.items() if own not in self.loaded)
        if missing:
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise InputError(f"the patch weights are missing ({some}): the checkpoint is incomplete or mixed")

    def names_here(self) -> set[str]:
        """What this process's model calls the tensors."""
        return {path for path, _ in self.here.values()}
