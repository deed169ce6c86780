"""docs/add/engine.md: what an engine pastes runs, and the schemas are those of the operators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import linearpatch_kernels as lp
from linearpatch_kernels import backend
from linearpatch_kernels.ops import hadamard_patch  # noqa: F401  (the operators are imported)
from linearpatch_kernels.ops.registration import DerivativeError
from tests.support.pages import ROOT, python_of, run_program

PAGE = ROOT / "docs/add/engine.md"
OPERATORS = ("hadamard_patch", "add_patch_rms_norm", "hadamard_patch_out")


def test_what_the_page_pastes_runs(tmp_path: Path) -> None:
    file = tmp_path / "engine.py"
    file.write_text(python_of("add/engine.md") + "print(normed.dtype, normed.is_contiguous(), *stream.shape)\n")
    assert run_program(file, LINEARPATCH_BACKEND="") == "torch.bfloat16 True 2 16 3072\n"


def test_the_page_fails_where_the_map_is_another(tmp_path: Path) -> None:
    """What it asserts can fail."""
    file = tmp_path / "engine.py"
    page = python_of("add/engine.md")
    assert page.count(", inverse=True") == 1
    file.write_text(page.replace(", inverse=True", ""))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):  # H of this width is not symmetric
        run_program(file, LINEARPATCH_BACKEND="")


def test_the_schemas_are_the_operators() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if line.startswith("linearpatch::")]
    assert told == [str(getattr(torch.ops.linearpatch, name).default._schema) for name in OPERATORS]


@pytest.mark.skipif(not backend.available("cpu").ok, reason="the extension is not built")
def test_what_the_kernel_says_is_on_the_page() -> None:
    x, wrong = torch.ones(2, 3072), torch.ones(64)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.linearpatch.hadamard_patch(x, wrong)
    assert f"`{raised.value}`" in PAGE.read_text(encoding="utf-8")


def test_a_gradient_of_the_norm_is_refused() -> None:
    x, ones = torch.ones(2, 3072, requires_grad=True), torch.ones(3072)
    normed, _ = lp.add_patch_rms_norm(x, x, ones, ones, 1e-5)
    with pytest.raises(DerivativeError, match="add_patch_rms_norm is not differentiable"):
        normed.sum().backward()
