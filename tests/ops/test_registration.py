"""A kernel for a device takes the reference's place there, and can call on it."""

from __future__ import annotations

import pytest
import torch

import linearpatch_kernels.ops.topk_kl  # noqa: F401  (defines its operators)
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch

OPS = torch.ops.linearpatch


def test_a_kernel_takes_the_place_of_the_reference_and_may_fall_back_on_it() -> None:
    calls = []

    def kernel(*arguments: torch.Tensor | None) -> torch.Tensor:
        calls.append(arguments[0].dtype)
        if arguments[0].dtype == torch.float64:
            return OPS.hadamard_patch_reference(*arguments)
        return torch.full_like(arguments[0], 7)

    x, scale = torch.randn(2, 12), torch.randn(12, requires_grad=True)
    before = hadamard_patch(x, scale)
    with torch.library._scoped_library("linearpatch", "IMPL") as library:
        library.impl("hadamard_patch", kernel, "CPU", allow_override=True)
        assert hadamard_patch(x, scale).eq(7).all()
        assert hadamard_patch(x.double(), scale).requires_grad
        torch.testing.assert_close(hadamard_patch(x.double(), scale).float(), before)
        torch.testing.assert_close(OPS.hadamard_patch_reference(x, scale.detach(), *[None] * 4), before.detach())
        assert torch.compile(hadamard_patch, fullgraph=True, backend="aot_eager")(x, scale).eq(7).all()
    assert calls == [torch.float32, torch.float64, torch.float64, torch.float32]
    assert hadamard_patch(x, scale).equal(before)


OPERATORS = [
    *("hadamard_patch", "hadamard_patch_backward", "hadamard_patch_out", "add_patch_rms_norm"),
    *("topk_kl_loss", "topk_kl_loss_backward", "linear_topk_kl_loss"),
]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_and_its_reference_have_one_schema(name: str) -> None:
    operator, reference = (str(getattr(OPS, n).default._schema) for n in (name, name + "_reference"))
    assert operator.replace(f"::{name}(", "(") == reference.replace(f"::{name}_reference(", "(")


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_are_positional(name: str) -> None:
    assert not any(argument.kwarg_only for argument in getattr(OPS, name).default._schema.arguments)
