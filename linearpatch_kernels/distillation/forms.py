"""In which form a joint's patch is trained, and how a trained dense one becomes a structured one."""

from __future__ import annotations

import torch

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.nn import DensePatch, HadamardPatch, Patch, PatchChain
from linearpatch_kernels.torch_state import own_state

FORMS = ("keep", "scale", "scales", "low-rank", "dense")
"""As it is; H D H.T; the same between two diagonals; that and a low-rank term; a full matrix."""


def check_form(form: str) -> str:
    """InputError for a name that is not in `FORMS`."""
    if form not in FORMS:
        raise InputError(f"no form of patch is called {form!r}: choose one of {', '.join(FORMS)}")
    return form


@own_state()
def reformed(chain: Patch | PatchChain, form: str, rank: int) -> Patch:
    """The patch of this form nearest to the map of a joint's patches, in float32.

    ``dense`` and, for a map that is H D H.T already, ``scale``, ``scales`` and ``low-rank`` are the same map; else
    Hadamard forms are the nearest in Frobenius norm (`HadamardPatch.from_dense`).

    Args:
        chain: the patches of the joint.
        form: of `FORMS`, not ``keep``.
        rank: of the low-rank term.

    Raises:
        InputError: an unknown form, a rank outside [1, d] for ``low-rank``, or a patch that is no linear map.
    """
    check_form(form)
    curved = [patch.kind for patch in PatchChain.of(chain) if not patch.linear]
    if curved:
        raise InputError(f"`patch` {form} is for linear maps, and a {curved[0]} patch is none: give `patch` keep")
    matrix = chain.to_dense()
    if form == "dense":
        return DensePatch.from_dense(matrix)
    if form == "low-rank" and not 1 <= rank <= len(matrix):
        raise InputError(f"`rank` {rank} is not between 1 and the model's width {len(matrix)}")
    near = HadamardPatch.from_dense(matrix, rank if form == "low-rank" else 0)
    if form == "scale":
        return near
    patch = HadamardPatch(near.dim, near.rank, pre_scale=True, post_scale=True, device=matrix.device)
    with torch.no_grad():
        for name, parameter in near.named_parameters():
            getattr(patch, name).copy_(parameter)
        _make_trainable(patch)
    return patch


def _make_trainable(patch: HadamardPatch) -> None:
    """Columns of ``down`` that are zero together with their rows of ``up`` would get no gradient, ever."""
    if patch.down is None or patch.up is None:
        return
    # What rounding left of nothing is nothing too.
    dead = patch.down.norm(dim=0) * patch.up.norm(dim=1) <= 1e-6 * patch.scale.norm()
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(patch.down.shape, generator=generator, dtype=torch.float32, device="cpu") * patch.dim**-0.5
    patch.down.copy_(torch.where(dead, fresh.to(patch.down), patch.down))
    patch.up.copy_(torch.where(dead[:, None], 0, patch.up))
