"""The maths of the patch in plain PyTorch: what every kernel is held to, and what runs where there is none.

A row x [d] is scaled, transformed, scaled, transformed back and scaled (LinearPatch, arXiv 2505.24680, section 3.2,
has ``scale`` alone), and a low-rank term may be added:

    z = x * pre        u = z @ H        v = u * scale        w = v @ H.T        y = w * post + (x @ down) @ up

The map is linear in x, so its gradient is the same map of dy with pre and post, and down and up, exchanged and
transposed. With ``a = (dy * post) @ H`` and ``b = (a * scale) @ H.T``:

    dx = b * pre + (dy @ up.T) @ down.T
    dscale = sum(a * u)        dpre = sum(b * x)        dpost = sum(dy * w)        (sums over the rows)
    ddown = x.T @ (dy @ up.T)        dup = (x @ down).T @ dy

float64 input is computed in float64, anything else in float32; the result is rounded once to x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearpatch_kernels.backend import has_memory
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import check_plain, hadamard_transform, without_autocast
from linearpatch_kernels.ops.overlap import share_memory


def _check_dense(**operands: Tensor | None) -> None:
    for name, operand in operands.items():
        if operand is not None and operand.layout != torch.strided:
            raise InputError(f"{name} must be a dense tensor, not {operand.layout}: give {name}.to_dense()")


def _check_patch_operands(
    x: Tensor,
    scale: Tensor,
    pre_scale: Tensor | None,
    post_scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> None:
    _check_dense(x=x, scale=scale, pre_scale=pre_scale, post_scale=post_scale, down=down, up=up)
    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise InputError(f"hadamard_patch needs a floating x [..., d], not {x.dtype} {list(x.shape)}")
    d = x.shape[-1]
    if d < 1:
        raise InputError(f"a Hadamard matrix needs a width of at least 1, not {d}")
    for name, vector in (("scale", scale), ("pre_scale", pre_scale), ("post_scale", post_scale)):
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != d or not vector.dtype.is_floating_point):
            raise InputError(
                f"{name} must be floating [{d}] as x's last dimension, not {vector.dtype} {list(vector.shape)}"
            )
    if (down is None) != (up is None):
        raise InputError("down and up belong together: give both or neither")
    if down is not None and up is not None:
        matrices = down.dim() == up.dim() == 2 and down.dtype.is_floating_point and up.dtype.is_floating_point
        if not matrices or down.shape[0] != d or up.shape[1] != d or down.shape[1] != up.shape[0]:
            shapes = f"{down.dtype} {list(down.shape)} and {up.dtype} {list(up.shape)}"
            raise InputError(f"down and up must be floating [{d}, r] and [r, {d}], not {shapes}")


def _check_norm_operands(x: Tensor, residual: Tensor, norm_weight: Tensor) -> None:
    _check_dense(residual=residual, norm_weight=norm_weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise InputError(
            f"residual must be {x.dtype} {list(x.shape)} as x is, not {residual.dtype} {list(residual.shape)}"
        )
    if norm_weight.dim() != 1 or norm_weight.shape != x.shape[-1:] or not norm_weight.dtype.is_floating_point:
        raise InputError(
            f"norm_weight must be floating [{x.shape[-1]}], not {norm_weight.dtype} {list(norm_weight.shape)}"
        )


def _check_out(x: Tensor, out: Tensor) -> None:
    _check_dense(out=out)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise InputError(f"out must be {x.dtype} {list(x.shape)} as x is, not {out.dtype} {list(out.shape)}")


def _check_out_is_apart(
    out: Tensor,
    scale: Tensor,
    pre_scale: Tensor | None,
    post_scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> None:
    """What is written while the others are read: of all operands, out may share memory with x alone."""
    if not has_memory(out):
        return
    if share_memory(out):
        raise InputError("out must have a place of its own for every element")
    others = {"scale": scale, "pre_scale": pre_scale, "post_scale": post_scale, "down": down, "up": up}
    for name, other in others.items():
        if other is not None and share_memory(out, other):
            raise InputError(f"out must share no memory with {name}: give a tensor of its own, or x")


def _arithmetic_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _patch_rows(
    x: Tensor,
    scale: Tensor,
    pre_scale: Tensor | None,
    post_scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """y for an x that is in the arithmetic's dtype already, not rounded."""
    z = x if pre_scale is None else x * pre_scale.to(x.dtype)
    y = hadamard_transform(hadamard_transform(z) * scale.to(x.dtype), inverse=True)
    if post_scale is not None:
        y = y * post_scale.to(x.dtype)
    if down is not None and up is not None:
        y = y + (x @ down.to(x.dtype)) @ up.to(x.dtype)
    return y


def hadamard_patch_reference(
    x: Tensor,
    scale: Tensor,
    *,
    pre_scale: Tensor | None = None,
    post_scale: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`linearpatch_kernels.hadamard_patch` without ``out``, in plain differentiable PyTorch."""
    check_plain(impl, "hadamard_patch")
    _check_patch_operands(x, scale, pre_scale, post_scale, down, up)
    with without_autocast(x.device):
        return _patch_rows(x.to(_arithmetic_dtype(x)), scale, pre_scale, post_scale, down, up).to(x.dtype)


def hadamard_patch_backward_reference(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    pre_scale: Tensor | None,
    post_scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, pre_scale, post_scale, down and up from ``grad`` [..., d], the gradient of y.

    Args:
        needs: which of the six are wanted; bit i stands for the i-th. A gradient that is not wanted, or is that of an
            operand that is None, is an empty tensor.

    Returns:
        dx in x's dtype, the others summed over the rows in the arithmetic's dtype.
    """
    dtype, d = _arithmetic_dtype(x), x.shape[-1]
    wants_x, wants_scale, wants_pre, wants_post, wants_down, wants_up = (
        operand is not None and bool(needs >> i & 1)
        for i, operand in enumerate((x, scale, pre_scale, post_scale, down, up))
    )
    x_, dy = x.to(dtype).reshape(-1, d), grad.to(dtype).reshape(-1, d)
    dx, dscale, dpre, dpost, ddown, dup = (x_.new_empty(0) for _ in range(6))

    if wants_x or wants_scale or wants_pre:
        a = hadamard_transform(dy if post_scale is None else dy * post_scale.to(dtype))
    if wants_scale or wants_post:
        u = hadamard_transform(x_ if pre_scale is None else x_ * pre_scale.to(dtype))
        dscale = (a * u).sum(0) if wants_scale else dscale
        dpost = (dy * hadamard_transform(u * scale.to(dtype), inverse=True)).sum(0) if wants_post else dpost
    if wants_x or wants_pre:
        b = hadamard_transform(a * scale.to(dtype), inverse=True)
        dpre = (b * x_).sum(0) if wants_pre else dpre
        dx = b if pre_scale is None else b * pre_scale.to(dtype)
    if down is not None and up is not None:
        lowered = dy @ up.to(dtype).mT
        dx = dx + lowered @ down.to(dtype).mT if wants_x else dx
        ddown = x_.mT @ lowered if wants_down else ddown
        dup = (x_ @ down.to(dtype)).mT @ dy if wants_up else dup
    dx = dx.reshape(x.shape).to(x.dtype) if wants_x else x.new_empty(0)
    return dx, dscale, dpre, dpost, ddown, dup


def add_patch_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    eps: float,
    pre_scale: Tensor | None,
    post_scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`linearpatch_kernels.add_patch_rms_norm`; the sum and the norm are not rounded in between."""
    _check_patch_operands(x, scale, pre_scale, post_scale, down, up)
    _check_norm_operands(x, residual, norm_weight)
    dtype = _arithmetic_dtype(x)
    y = _patch_rows(x.to(dtype) + residual.to(dtype), scale, pre_scale, post_scale, down, up)
    normed = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    return normed.to(x.dtype), y.to(x.dtype)
