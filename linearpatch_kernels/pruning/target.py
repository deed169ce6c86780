"""What a person wants of the shallower model in place of a number of layers: so fast, so small, or so good."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import decoder_layers

Quantity = Literal["decode", "size", "ppl"]
_FORMS = "1.25x-decode, 90%-size or 1.2x-ppl"


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio to the dense model.

    Attributes:
        of: ``decode``, the speed of a decode step where reading the weights bounds it; ``size``, the weights' bytes;
            ``ppl``, the perplexity on held-out text.
        ratio: of the shallower model's to the dense model's.
    """

    of: Quantity
    ratio: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """``"1.25x-decode"``, ``"90%-size"``, ``"1.2x-ppl"``; a percentage is a ratio in hundredths.

        Raises:
            InputError: anything else, or a ratio that asks for no layer to go.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(x|%)-(decode|size|ppl)", text.strip())
        if found is None:
            raise InputError(f"`target` {text} is not understood: write it as {_FORMS}")
        ratio = float(found[1]) / (100 if found[2] == "%" else 1)
        of: Quantity = found[3]  # type: ignore[assignment]  # one of the three, by the expression above
        if (of == "size" and not 0 < ratio < 1) or (of != "size" and ratio <= 1):
            side = "below" if of == "size" else "above"
            raise InputError(f"`target` {text} is what the dense model has: give a ratio {side} 1, as in {_FORMS}")
        return cls(of, ratio)

    def __str__(self) -> str:
        return f"{self.ratio:.4g}x-{self.of}"


def layers_to_reach(target: Target, model: PreTrainedModel) -> int:
    """The least number of layers without which a model is as small or as fast as a target asks.

    Whichever layers they are: where layers differ, the smallest are counted. A decode step at batch 1 reads every
    weight once but the table of the input embedding, unless that is the head, too; its speed goes with the bytes.

    Args:
        target: of ``size`` or ``decode``.

    Raises:
        InputError: more layers than can go.
    """
    layers = decoder_layers(model)
    embedding = model.get_input_embeddings()
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding.weight
    unread = 0 if target.of == "size" or tied else _bytes(embedding)
    whole = _bytes(model) - unread
    most = whole * target.ratio if target.of == "size" else whole / target.ratio
    left = whole
    for count, size in enumerate(sorted(_bytes(layer) for layer in layers[1:-1]), 1):
        left -= size
        if left <= most:
            return count
    raise InputError(
        f"`target` {target} asks for more than all layers: without all but the first and the last, "
        f"{left / whole:.0%} of the weights are left"
    )


def _bytes(module: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())
