"""fast-hadamard-transform in `hadamard_transform`, by a stand-in that computes what it documents."""

from __future__ import annotations

import runpy
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from linearpatch_kernels import hadamard
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_matrix, hadamard_transform
from linearpatch_kernels.modeling.families import STOCK_FAMILIES
from linearpatch_kernels.modeling.modeling_file import modeling_source


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What the stand-in was called with, after it was asked for; it serves CPU tensors here."""
    seen: list[tuple[int, ...]] = []

    def transform(x: Tensor, scale: float = 1.0) -> Tensor:
        """``F.linear(x, scipy.linalg.hadamard(dim)) * scale``"""
        seen.append(tuple(x.shape))
        d = x.shape[-1]
        return (x.double() @ hadamard_matrix(d) * (d**0.5 * scale)).to(x.dtype)

    package = ModuleType("fast_hadamard_transform")
    package.hadamard_transform = transform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", package)
    monkeypatch.setattr(hadamard, "_CHOSEN", "fast-hadamard-transform")
    monkeypatch.setattr(hadamard, "_PACKAGE_DEVICES", ("cpu",))
    return seen


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_package_transforms_what_it_covers(calls: list[tuple[int, ...]], dtype: torch.dtype, inverse: bool) -> None:
    x = torch.randn(3, 5, 64).to(dtype).transpose(0, 1)
    y = hadamard_transform(x, inverse=inverse)
    assert calls == [(5, 3, 64)]
    assert y.dtype == dtype
    exact = x.double() @ hadamard_matrix(64)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 12), torch.randn(2, 4), torch.randn(1, 65536), torch.randn(2, 64).double(), torch.randn(0, 64)],
    ids=["m = 12", "too narrow", "too wide", "float64", "empty"],
)
def test_the_rest_is_ours(calls: list[tuple[int, ...]], x: Tensor) -> None:
    y = hadamard_transform(x)
    assert calls == []
    torch.testing.assert_close(hadamard_transform(y, inverse=True), x)


def test_not_on_the_cpu_and_not_unless_asked_for(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard, "_PACKAGE_DEVICES", ("cuda",))
    hadamard_transform(torch.randn(2, 64))
    monkeypatch.setattr(hadamard, "_PACKAGE_DEVICES", ("cpu",))
    monkeypatch.setattr(hadamard, "_CHOSEN", None)
    hadamard_transform(torch.randn(2, 64))
    assert calls == []


@pytest.mark.usefixtures("calls")
def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", None)
    with pytest.raises(InputError, match=r"is not available .*: pip install fast-hadamard-transform"):
        hadamard_transform(torch.randn(2, 64))


def test_an_unknown_name_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARPATCH_HADAMARD", "fastest")
    with pytest.raises(InputError, match="LINEARPATCH_HADAMARD=fastest is not known"):
        runpy.run_path(str(hadamard.__file__))
    source = modeling_source(next(iter(STOCK_FAMILIES.values())))  # which has its own copy, and of the error
    with pytest.raises(ValueError, match="LINEARPATCH_HADAMARD=fastest is not known"):
        exec(source, {"__name__": "modeling_linearpatch"})
