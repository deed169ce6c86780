"""The losses' Triton kernels compiled without a GPU; `gpu_static` counts their machine code."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_static import DTYPES, compile_ahead, lanes_of

KERNELS = (
    "linear_topk_kl_forward",  # the slots' logits of the linear loss for "topk"
    "linear_topk_kl_forward_backward",  # and dhidden, in the same pass
    "topk_kl_token",  # a token's normalisers, loss and slot gradients
    "topk_kl_combine_rows",  # dweight by sorted segments
    "topk_kl_vocabulary",  # a part of the vocabulary: the online log-sum-exp of "full" and "tail"
    "topk_kl_vocabulary_exp",  # and what dhidden is made of
    "topk_kl_vocabulary_gradient",
)
# Of the rest the kernels' names for their pointers say what they are: numbers of the model are in its dtype.
_FLOAT32 = {"z_ptr", "rest_ptr", "scale_ptr", "loss_ptr", "normalizers_ptr", "dz_ptr", "factor_ptr", "factors_ptr",
            "sums_ptr", "old_factors_ptr", "out_ptr", "bias_ptr", "probs_ptr"}  # fmt: skip
_INTEGERS = {"ids_ptr", "index_ptr", "starts_ptr", "bounds_ptr"}


def _what(kernel: str, d: int, slots: int, lanes: int) -> tuple[Any, dict[str, Any], int, set[str], set[str]]:
    """The function, its constants, its warps, pointers that are None, and those that are in float32 here alone."""
    from linearpatch_kernels.ops.topk_kl import triton as kernels

    if kernel.startswith("linear_topk_kl"):
        layout = kernels.layout_of(d, slots, lanes)
        if layout is None:
            raise ValueError(f"Triton leaves d = {d} to PyTorch")
        missing = set() if kernel.endswith("backward") else {"dhidden_ptr"}
        return kernels.slots_kernel, layout.constants, layout.warps, missing | {"bias_ptr"}, set()
    if kernel == "topk_kl_token":
        constants = {"WHOLE": True, "TAIL": True, "SLOTS": kernels.slots_at_once(slots)}
        return kernels.token_kernel, constants, kernels.token_warps(slots), set(), set()
    if kernel == "topk_kl_combine_rows":
        constants, warps = kernels.combine_layout(d)
        return kernels.combine_rows_kernel, constants, warps, {"old_factors_ptr", "sums_ptr"}, set()
    if kernel == "topk_kl_vocabulary_gradient":
        constants = {"WHOLE": True, "TAIL": True, "BLOCK": kernels.BLOCK, "SLOTS": kernels.slots_at_once(slots)}
        return kernels.vocabulary_gradient_kernel, constants, kernels.WARPS, {"bias_ptr"}, {"logits_ptr"}
    missing = set() if kernel.endswith("exp") else {"exp_ptr", "dhidden_ptr"}
    constants = {"BLOCK": kernels.BLOCK, "CHUNK": kernels.CHUNK}
    return kernels.vocabulary_kernel, constants, kernels.WARPS, missing | {"bias_ptr"}, {"logits_ptr", "dhidden_ptr"}


def compile_triton(kernel: str, arch: str, dtype: str, d: int, slots: int) -> tuple[Any, dict[str, Any], int]:
    """The kernel as a machine with this GPU would compile it, its constants and warps; no GPU is needed."""
    from linearpatch_kernels.ops.topk_kl.triton import OPTIONS

    function, constants, warps, missing, float32 = _what(kernel, d, slots, lanes_of(arch))
    if dtype == "float16":
        float32 = float32 | {"dhidden_ptr"}  # which a loss scale is there to save

    def kind(name: str) -> str:
        if name in constants or name in missing:
            return "constexpr"
        if name == "inverse":
            return "fp32"
        if not name.endswith("_ptr"):
            return "i32"
        if name in _INTEGERS:
            return "*i32"
        return "*fp32" if name in _FLOAT32 | float32 else "*" + DTYPES[dtype][0]

    compiled = compile_ahead(function, kind, constants, arch, {"num_warps": warps, **OPTIONS})
    return compiled, constants, warps
