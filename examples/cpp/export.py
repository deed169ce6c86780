"""Writes what the C++ programs beside it read: the operators' schemas, operands with results, and a compiled block.

``python export.py operators`` prints the schemas for `library.cpp`. ``python export.py DIR`` writes into DIR:

* ``operators.pt``: operands of the operators, what they give in Python, and the Hadamard matrix of their width;
* ``block.pt2``: a decoder layer with a patch in front, as `torch.export` and AOTInductor make it; ``block.pt``: a
  stream, what the block gives in Python, and the same matrix.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import linearpatch_kernels as lp
from linearpatch_kernels.hadamard import paley_factor
from linearpatch_kernels.nn import HadamardPatch

WIDTH = 192  # 12 * 16: a width whose matrix the C++ side has to be given


def operators() -> str:
    """A line of C++ for each operator that an engine calls."""
    called = (torch.ops.linearpatch.hadamard_patch, torch.ops.linearpatch.add_patch_rms_norm)
    return "\n".join(f'library.def("{one.default._schema}");' for one in called)


def operands(dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of a joint, with what the operators make of them."""
    x = torch.randn(2, WIDTH, 5).to(dtype).mT  # any strides will do
    residual = torch.randn(2, 5, WIDTH).to(dtype)
    scales = {name: torch.rand(WIDTH) + 0.5 for name in ("scale", "pre_scale", "post_scale")}
    low_rank = {"down": torch.randn(WIDTH, 3) / WIDTH, "up": torch.randn(3, WIDTH)}
    norm_weight = torch.rand(WIDTH) + 0.5
    patched = lp.hadamard_patch(x, **scales, **low_rank)
    normed, stream = lp.add_patch_rms_norm(x, residual, norm_weight=norm_weight, eps=1e-6, **scales, **low_rank)
    given = {"x": x, "residual": residual, "norm_weight": norm_weight, **scales, **low_rank}
    return {**given, "patched": patched, "normed": normed, "stream": stream}


class Block(nn.Module):
    """The layer behind a joint, and the joint's patch: what an engine compiles as one."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=6, num_key_value_heads=2
        )
        config._attn_implementation = "sdpa"
        self.patch = HadamardPatch(WIDTH, rank=4, pre_scale=True)
        for parameter in self.patch.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        return self.layer(self.patch(hidden), position_embeddings=self.rotary(hidden, positions))


def export(directory: Path) -> None:
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    matrix = {"matrix": paley_factor(WIDTH)[0]}
    for name, dtype in (("operators.pt", torch.float32), ("operators-bfloat16.pt", torch.bfloat16)):
        torch.save({**operands(dtype), **matrix}, directory / name)
    block, hidden = Block().eval(), torch.randn(1, 7, WIDTH)
    with torch.no_grad():
        length = torch.export.Dim("length", min=2, max=512)
        exported = torch.export.export(block, (torch.randn(1, 16, WIDTH),), dynamic_shapes={"hidden": {1: length}})
        torch._inductor.aoti_compile_and_package(exported, package_path=str(directory / "block.pt2"))
        torch.save({"hidden": hidden, "result": block(hidden), **matrix}, directory / "block.pt")


if __name__ == "__main__":
    if sys.argv[1:] == ["operators"]:
        print(operators())
    else:
        export(Path(sys.argv[1]))
