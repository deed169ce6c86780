"""A trained dense patch taken back to Hadamard + rank r, as what flows through it sees the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import joint_statistics
from linearpatch_kernels.distillation.teacher_store import TeacherStore
from linearpatch_kernels.distillation.trainer import joint_depth, joint_state
from linearpatch_kernels.forward import PartialRun, entering, leaving
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.patched import replace_patch
from linearpatch_kernels.nn import HadamardPatch, PatchChain
from linearpatch_kernels.torch_state import eval_mode, own_state

# Relative to the mean eigenvalue: where the text never went, the two should be alike as matrices.
_RIDGE = 1e-4
_WINDOWS = 64


@own_state()
def structure(
    student: PreTrainedModel,
    store: TeacherStore,
    *,
    joint: int,
    windows: Sequence[int],
    dense: Mapping[int, PatchChain],
    rank: int,
) -> None:
    """Put the nearest Hadamard + rank r into the place of dense patches: least ``||X (P - Q)||_F`` on the store's text.

    Each token is divided by the norm of ``x P``, as the RMSNorm behind it will; otherwise the first tokens, attention
    sinks, would be all that counts. At most 64 of the windows are run, from the joint on.

    Args:
        student: changed in place.
        joint: its first joint; nothing before it differs from the teacher.
        windows: numbers of windows in the store.
        dense: the chains to replace, by joint.
        rank: r in [0, d].
    """
    measured = {at: input_moments(student, store, chain, joint=joint, windows=windows) for at, chain in dense.items()}
    for at, chain in dense.items():
        structured = HadamardPatch.from_dense(chain.to_dense(), rank, second_moments=measured[at])
        replace_patch(student, at, structured.to(student.dtype))


@torch.no_grad()
def input_moments(
    student: PreTrainedModel, store: TeacherStore, chain: PatchChain, *, joint: int, windows: Sequence[int]
) -> Tensor:
    """X.T @ X [d, d], float64, of the stream that enters a chain, every token over the norm of what leaves it; plus a
    ten-thousandth of its mean eigenvalue times the identity."""
    pairs = _through(student, store, chain, joint, windows[:_WINDOWS])
    moments = joint_statistics(pairs, "a trained patch").collected_moments().xx
    return moments + _RIDGE * moments.diagonal().mean() * torch.eye(
        len(moments), dtype=moments.dtype, device=moments.device
    )


def _through(
    student: PreTrainedModel, store: TeacherStore, chain: PatchChain, joint: int, windows: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per window the tokens [T, d] before and after the chain."""
    begin = joint_depth(student, joint)
    run = PartialRun(student, begin, num_layers(student))
    seen: list[Tensor] = []
    with eval_mode(student), entering([(chain, seen.append)]), leaving([(chain, seen.append)]):
        for window in windows:
            run(joint_state(student, store.batch([window], [begin]), begin))
            yield seen[0].flatten(0, 1), seen[1].flatten(0, 1)
            seen.clear()
