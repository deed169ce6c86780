"""The page on the checkpoint format is enough to write a loader: one that was written from it finds the same maps."""

from __future__ import annotations

import ast
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch

from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.patched import patched_model, patches
from linearpatch_kernels.nn import HadamardPatch, NormLinearPatch
from tests.modeling import format_reader
from tests.support.tiny import FAMILY_NAMES, random_patch, tiny_model


def test_the_reader_is_short_and_knows_nothing_of_this_package() -> None:
    source = Path(format_reader.__file__).read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in source.splitlines()) < 60
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert names - set(sys.stdlib_module_names) == {"numpy", "safetensors"}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_reader_s_patches_do_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    joints = {
        0: random_patch("hadamard"),
        1: [random_patch("low-rank"), random_patch("hadamard", seed=2), random_patch("diagonal")],
        2: [HadamardPatch(48), random_patch("norm-linear"), random_patch("norm-linear low-rank")],
        3: NormLinearPatch(48, hadamard=True),
        4: [random_patch("dense"), random_patch("norm-linear hadamard"), random_patch("low-rank", seed=3)],
    }
    model = patched_model(keep_layers(tiny_model(family), [0, 1, 4, 5]).to(dtype), joints)
    model.save_pretrained(tmp_path)
    found = dict(format_reader.read(tmp_path))
    assert found.keys() == joints.keys()
    x = torch.randn(7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for joint, chain in patches(model).items():
        y = reduce(format_reader.after, found[joint], x.numpy())
        np.testing.assert_allclose(y, chain.double()(x).numpy(), rtol=0, atol=1e-11)


# Powers of two; both constructions; fields of 5^2 and 3^3 elements; blocks; a product of orders, 28 * 68.
@pytest.mark.parametrize("widths", [range(1, 130), (144, 336, 1904)], ids=["small", "more"])
def test_the_page_s_matrix_is_ours(widths: range | tuple[int, ...]) -> None:
    for width in widths:
        np.testing.assert_allclose(format_reader.hadamard(width)[0], hadamard_matrix(width).numpy(), rtol=0, atol=1e-14)
