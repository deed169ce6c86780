"""The patches that can stand at a joint, and the distillation losses, as modules.

A patch maps the residual stream x, rows of d numbers, to one of the same shape. All but `NormLinearPatch` are linear,
``y = x @ P`` with row vectors. Each is rebuilt from its `Patch.description` by `build_patch`. A new kind of patch is
one class here, named in `PATCH_KINDS`. What stands at a joint is a `PatchChain` of one or more.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import bounded_order, factor_order, hadamard_order, hadamard_transform
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from linearpatch_kernels.ops.topk_kl.reference import check_options


class Patch(nn.Module):
    """A map on the residual stream: x [..., dim] to y [..., dim], in x's dtype; ``y = x @ P`` where ``linear``.

    Parameters are float32 unless asked or cast otherwise; a new patch is the identity.
    """

    kind: str
    dim: int
    linear: bool = True
    """Whether it is a matrix P, so that `to_dense` has one."""

    def description(self) -> dict[str, Any]:
        """What `build_patch` needs to make an empty patch of the same kind and shape; JSON-able."""
        return {"kind": self.kind, "dim": self.dim}

    @property
    def num_parameters(self) -> int:
        """How many numbers the patch holds."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations for one token: additions and multiplications."""
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """P [dim, dim] in float64, on the parameters' device; an InputError of a patch that is not ``linear``."""
        device = next(self.parameters()).device
        dense: Tensor = self(torch.eye(self.dim, dtype=torch.float64, device=device))
        return dense


class HadamardPatch(Patch):
    """``P = diag(pre) H diag(scale) H.T diag(post) + down @ up`` (LinearPatch, section 3.2; pre, post, down, up ours).

    Args:
        dim: width d of the residual stream.
        rank: r of the low-rank term; 0 for none.
        pre_scale, post_scale: also scale the channels before and after.
        order: of H, refused if this version has another (`hadamard_order`); 0: this version's.
        device, dtype: of the parameters ``scale``, ``pre_scale``, ``post_scale`` [d], ``down`` [d, r], ``up`` [r, d];
            those that are not there are None.
        impl: as of `linearpatch_kernels.hadamard_patch`; no part of the description.

    Raises:
        InputError: a width below 1, a rank below 0, another order.
    """

    kind = "hadamard"
    scale: nn.Parameter
    pre_scale: nn.Parameter | None
    post_scale: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None
    impl: str = "auto"  # of the class as well, for patches that were pickled without one

    def __init__(
        self,
        dim: int,
        rank: int = 0,
        *,
        pre_scale: bool = False,
        post_scale: bool = False,
        order: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        _check_size(dim, rank)
        _check_order(dim, order, hadamard_order(dim) if order else 0)
        self.dim, self.rank, self.impl = dim, rank, impl
        scales = {"scale": True, "pre_scale": pre_scale, "post_scale": post_scale}
        for name, present in scales.items():
            ones = torch.ones(dim, device=device, dtype=dtype) if present else None
            self.register_parameter(name, None if ones is None else nn.Parameter(ones))
        down, up = _empty_low_rank(dim, rank, device, dtype) if rank else (None, None)
        self.register_parameter("down", down)
        self.register_parameter("up", up)

    @classmethod
    def from_dense(cls, matrix: Tensor, rank: int = 0, *, second_moments: Tensor | None = None) -> Self:
        """The patch (``scale`` and, for a rank, ``down`` and ``up``) nearest to a matrix [d, d].

        Without ``second_moments`` in Frobenius norm; with those of the inputs, ``C = X.T @ X``, in what it makes of
        them: ``||X @ (matrix - P)||_F``. H leaves either norm as it is, so this is the diagonal plus rank-r matrix
        nearest to ``H.T @ matrix @ H``, for inputs of moments ``H.T @ C @ H``. For rank 0 the minimum is global; for a
        rank, `nearest_diagonal_plus_low_rank` says which one is found. Computed in float64 on the matrix's device; the
        parameters are float32.

        Raises:
            InputError: not a square floating matrix, moments of another shape or not positive definite, or a rank that
                is not in [0, d].
        """
        dim = _check_square(matrix, rank)
        moments = None if second_moments is None else _in_hadamard_domain(second_moments.to(matrix.device))
        scale, down, up = nearest_diagonal_plus_low_rank(_in_hadamard_domain(matrix), rank, moments)
        patch = cls(dim, rank, device=matrix.device)
        with torch.no_grad():
            patch.scale.copy_(scale)
            if patch.down is not None and patch.up is not None:
                patch.down.copy_(hadamard_transform(down.mT, inverse=True).mT)
                patch.up.copy_(hadamard_transform(up, inverse=True))
        return patch

    def forward(self, x: Tensor) -> Tensor:
        return self._by(self.impl, x)

    def _by(self, impl: str, x: Tensor) -> Tensor:
        own: dict[str, Any] = self._parameters
        # Each of the five by nn.Module's own __getattr__ takes longer than the arithmetic on a narrow row.
        try:
            scale, pre, post, down, up = own["scale"], own["pre_scale"], own["post_scale"], own["down"], own["up"]
        except KeyError:  # parametrised, pruned, or a replica of torch's DataParallel: there as attributes only
            scale, pre, post, down, up = self.scale, self.pre_scale, self.post_scale, self.down, self.up
        if impl == "auto":  # not given, because a checkpoint's code may meet the operator of a version without it
            return hadamard_patch(x, scale, pre_scale=pre, post_scale=post, down=down, up=up)
        return hadamard_patch(x, scale, pre_scale=pre, post_scale=post, down=down, up=up, impl=impl)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """P [dim, dim] in float64, on the parameters' device; by plain PyTorch, because no kernel is of float64."""
        return self._by("auto", torch.eye(self.dim, dtype=torch.float64, device=self.scale.device))

    def description(self) -> dict[str, Any]:
        present = {"pre_scale": self.pre_scale is not None, "post_scale": self.post_scale is not None}
        # Told where another version has another matrix: neither must take its patches for the other's.
        order = bounded_order(self.dim)
        return {**super().description(), "rank": self.rank, **present, **({"order": order} if order else {})}

    @property
    def flops_per_token(self) -> int:
        """Two transforms of ``m - 1 + k`` additions per channel (d = m 2^k), the scales, and the low-rank products."""
        m, k = factor_order(self.dim)
        scales = 1 + (self.pre_scale is not None) + (self.post_scale is not None)
        low_rank = 4 * self.rank + 1 if self.rank else 0
        return self.dim * (2 * (m - 1 + k) + scales + low_rank)


class LowRankPatch(Patch):
    """``P = I + down @ up``: y = x + (x @ down) @ up, with ``down`` [d, r] and ``up`` [r, d].

    Args:
        dim: width d of the residual stream.
        rank: r, at least 1.
        device, dtype: of the parameters.

    Raises:
        InputError: a width or a rank below 1.
    """

    kind = "low-rank"

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_size(dim, rank, least_rank=1)
        self.dim, self.rank = dim, rank
        self.down, self.up = _empty_low_rank(dim, rank, device, dtype)

    @classmethod
    def from_dense(cls, matrix: Tensor, rank: int, *, second_moments: Tensor | None = None) -> Self:
        """The patch nearest to a matrix [d, d]: `nearest_low_rank` of ``matrix - I``.

        Without ``second_moments`` in Frobenius norm; with those of the inputs, ``X.T @ X``, in what it makes of them:
        ``||X @ (matrix - P)||_F``.

        Raises:
            InputError: not a square floating matrix, moments of another shape or not positive definite, or a rank that
                is not in [1, d].
        """
        dim = _check_square(matrix, rank, least_rank=1)
        rest = matrix.detach().double() - torch.eye(dim, dtype=torch.float64, device=matrix.device)
        patch = cls(dim, rank, device=matrix.device)
        down, up = nearest_low_rank(rest, rank, second_moments)
        with torch.no_grad():
            patch.down.copy_(down)
            patch.up.copy_(up)
        return patch

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, self.down.dtype))
        return (wide + (wide @ self.down.to(wide.dtype)) @ self.up.to(wide.dtype)).to(x.dtype)

    def description(self) -> dict[str, Any]:
        return {**super().description(), "rank": self.rank}

    @property
    def flops_per_token(self) -> int:
        """Two thin products and the sum."""
        return self.dim * (4 * self.rank + 1)


class DiagonalPatch(Patch):
    """``P = diag(scale)``: y = x * scale, with ``scale`` [d] (LinearPatch without the transform).

    Args:
        dim: width d of the residual stream.
        device, dtype: of the parameter.

    Raises:
        InputError: a width below 1.
    """

    kind = "diagonal"

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_size(dim)
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.scale.dtype)
        return (x.to(wide) * self.scale.to(wide)).to(x.dtype)

    @property
    def flops_per_token(self) -> int:
        """One multiplication per channel."""
        return self.dim


class DensePatch(Patch):
    """``P = weight`` [d, d]: y = x @ weight.

    Args:
        dim: width d of the residual stream.
        device, dtype: of the parameter.

    Raises:
        InputError: a width below 1.
    """

    kind = "dense"

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_size(dim)
        self.dim = dim
        self.weight = nn.Parameter(torch.eye(dim, device=device, dtype=dtype))

    @classmethod
    def from_dense(cls, matrix: Tensor) -> Self:
        """The patch that is this matrix [d, d], rounded to float32.

        Raises:
            InputError: not a square floating matrix.
        """
        patch = cls(_check_square(matrix), device=matrix.device)
        with torch.no_grad():
            patch.weight.copy_(matrix)
        return patch

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return (wide @ self.weight.to(wide.dtype)).to(x.dtype)

    @property
    def flops_per_token(self) -> int:
        """One matrix-vector product."""
        return 2 * self.dim**2


class NormLinearPatch(Patch):
    """``y = x + RMSNorm(x) @ M``, with ``RMSNorm(x) = x / sqrt(mean(x^2) + eps)``: a linear map of the normed stream.

    The layer that may replace an attention or a feed-forward block in Nemotron-NAS models (Puzzle, arXiv 2411.19146),
    so that some engines run it already. The norm has no gain g, which M takes in as ``diag(g) @ M``; an engine that
    wants one takes ones. M is

    - ``weight`` [d, d];
    - ``down @ up``, with ``down`` [d, r] and ``up`` [r, d], for a rank;
    - ``H diag(scale) H.T`` for ``hadamard``, plus ``down @ up`` for a rank: the operator `hadamard_patch`.

    It is not linear in x: what it adds does not grow with the row. So `to_dense` raises, and `normed_matrix` gives M.

    Equivalent in PyTorch: ``x + torch.nn.functional.rms_norm(x, (d,), eps=eps) @ M``.

    Args:
        dim: width d of the residual stream.
        rank: r of ``down @ up``; 0 for none.
        hadamard: M in the Hadamard domain.
        order: of H, as of `HadamardPatch`; 0 without ``hadamard``.
        eps: of the norm. The fits take the model's ``rms_norm_eps``, because an engine has one for all its norms.
        device, dtype: of the parameters; those that are not there are None.

    Raises:
        InputError: a width below 1, a rank below 0, another order, an eps that is negative or not finite.
    """

    kind = "norm-linear"
    linear = False
    weight: nn.Parameter | None
    scale: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        rank: int = 0,
        *,
        hadamard: bool = False,
        order: int = 0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_size(dim, rank)
        _check_order(dim, order, hadamard_order(dim) if order and hadamard else 0)
        _check_eps(eps)
        self.dim, self.rank, self.hadamard, self.eps = dim, rank, hadamard, eps
        sizes = {"weight": None if rank or hadamard else (dim, dim), "scale": (dim,) if hadamard else None}
        for name, size in sizes.items():
            zeros = None if size is None else nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
            self.register_parameter(name, zeros)
        down, up = _empty_low_rank(dim, rank, device, dtype) if rank else (None, None)
        self.register_parameter("down", down)
        self.register_parameter("up", up)

    @classmethod
    def from_dense(
        cls,
        matrix: Tensor,
        rank: int = 0,
        *,
        hadamard: bool = False,
        eps: float = 1e-6,
        second_moments: Tensor | None = None,
    ) -> Self:
        """The patch whose M is nearest to a matrix [d, d]: that matrix for rank 0 without ``hadamard``.

        Without ``second_moments`` in Frobenius norm; with those of the normed rows, ``N.T @ N``, in what it makes of
        them: ``||N @ (matrix - M)||_F``. Low rank as `nearest_low_rank`, the Hadamard domain as
        `HadamardPatch.from_dense`; computed in float64.

        Raises:
            InputError: not a square floating matrix, moments of another shape or not positive definite, a rank that is
                not in [0, d], or as the constructor.
        """
        patch = cls(_check_square(matrix, rank), rank, hadamard=hadamard, eps=eps, device=matrix.device)
        if hadamard:
            found = HadamardPatch.from_dense(matrix, rank, second_moments=second_moments).state_dict()
        elif rank:
            down, up = nearest_low_rank(matrix.detach().double(), rank, second_moments)
            found = {"down": down, "up": up}
        else:
            found = {"weight": matrix}
        with torch.no_grad():
            for name, value in found.items():
                patch.get_parameter(name).copy_(value)
        return patch

    def forward(self, x: Tensor) -> Tensor:
        own = next(one.dtype for one in (self.weight, self.scale, self.down) if one is not None)
        wide = x.to(torch.promote_types(x.dtype, own))
        normed = nn.functional.rms_norm(wide, (self.dim,), eps=self.eps)
        # Not `addmm`, which under autocast would round the stream itself to 16 bits.
        return (wide + self._times_matrix(normed)).to(x.dtype)

    def _times_matrix(self, rows: Tensor) -> Tensor:
        weight, scale, down, up = self.weight, self.scale, self.down, self.up
        if scale is not None:
            return hadamard_patch(rows, scale, down=down, up=up)
        if weight is not None:
            return rows @ weight.to(rows.dtype)
        assert down is not None
        assert up is not None
        return rows @ down.to(rows.dtype) @ up.to(rows.dtype)

    def to_dense(self) -> Tensor:
        """There is no such matrix: raises InputError."""
        raise InputError(
            "a norm-linear patch adds a linear map of the normed stream, so that no matrix P is the whole patch: "
            "`normed_matrix()` is the M in x + RMSNorm(x) M"
        )

    @torch.no_grad()
    def normed_matrix(self) -> Tensor:
        """M [dim, dim] in float64, on the parameters' device."""
        device = next(self.parameters()).device
        return self._times_matrix(torch.eye(self.dim, dtype=torch.float64, device=device))

    def description(self) -> dict[str, Any]:
        order = bounded_order(self.dim) if self.hadamard else None
        told = {"rank": self.rank, "hadamard": self.hadamard, "eps": float(self.eps)}
        return {**super().description(), **told, **({"order": order} if order else {})}

    @property
    def flops_per_token(self) -> int:
        """The norm (squares, their sum, the quotient), the product by M, and the sum."""
        product = 4 * self.dim * self.rank
        if self.hadamard:
            m, k = factor_order(self.dim)
            product += self.dim * (2 * (m - 1 + k) + 1 + (self.rank > 0))
        elif not self.rank:
            product = 2 * self.dim**2
        return product + 4 * self.dim


class PatchChain(nn.Sequential):
    """The patches of one joint, applied in their order: ``y = x @ (P_0 @ P_1 @ ...)`` where all are linear.

    ``chain[i]`` is patch i, and its tensors are called ``i.scale``, ``i.weight``, ... in the state dict.

    Args:
        patches: at least one, all of one width; they are held, not copied.

    Raises:
        InputError: no patch, something that is none, or patches of different widths.
    """

    def __init__(self, *patches: Patch) -> None:
        super().__init__(*patches)
        if not self:
            raise InputError("there is no patch: a chain holds at least one")
        for patch in self:
            # Not by the class: a checkpoint's own code has others, which compute the same.
            if not hasattr(patch, "dim"):
                raise InputError(f"a {type(patch).__name__} is no patch")
        widths = sorted({patch.dim for patch in self})
        if len(widths) > 1:
            raise InputError(f"patches of the widths {', '.join(map(str, widths))} do not follow each other")

    @classmethod
    def of(cls, patches: Patch | Iterable[Patch]) -> PatchChain:
        """The chain of one patch, or of several; a chain is returned as it is."""
        if isinstance(patches, PatchChain):
            return patches
        return cls(*patches) if isinstance(patches, Iterable) else cls(patches)

    def __iter__(self) -> Iterator[Patch]:
        return super().__iter__()  # type: ignore[return-value]  # torch types them as modules

    @property
    def patches(self) -> tuple[Patch, ...]:
        """In the order in which they are applied."""
        return tuple(self)

    @property
    def dim(self) -> int:
        """The width d of the residual stream."""
        return self.patches[0].dim

    @property
    def linear(self) -> bool:
        """Whether all patches are, so that `to_dense` has their product."""
        return all(getattr(patch, "linear", True) for patch in self)

    def description(self) -> list[dict[str, Any]]:
        """What `Patch.description` tells of every patch: the joint's list in a config and in a plan; JSON-able."""
        return [patch.description() for patch in self]

    @property
    def num_parameters(self) -> int:
        """How many numbers the patches hold."""
        return sum(patch.num_parameters for patch in self)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations for one token: additions and multiplications."""
        return sum(patch.flops_per_token for patch in self)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """P [dim, dim] in float64, on the parameters' device: the product of the patches' matrices.

        Raises:
            InputError: not ``linear``.
        """
        matrices = [patch.to_dense() for patch in self]
        return torch.linalg.multi_dot(matrices) if len(matrices) > 1 else matrices[0]


_FIELD_TYPES: dict[str, type] = {"int": int, "bool": bool, "float": float}
# Four times the widest model there is.
_WIDEST = 1 << 16
# A joint has a patch for every time that it was cut.
_MOST_PATCHES = 256

PATCH_KINDS: dict[str, type[Patch]] = {
    one.kind: one for one in (HadamardPatch, LowRankPatch, DiagonalPatch, DensePatch, NormLinearPatch)
}


def build_patch(description: Mapping[str, Any], *, dim: int | None = None) -> Patch:
    """An untrained patch of the kind and shape that `Patch.description` told.

    Args:
        description: of one patch; it may come from a file.
        dim: the width of the model that it is for.

    Raises:
        InputError: as `check_description`; nothing has been allocated then.
    """
    check_description(description, dim)
    fields = {name: value for name, value in description.items() if name != "kind"}
    return PATCH_KINDS[description["kind"]](**fields)


def build_chain(descriptions: Any, *, dim: int | None = None) -> PatchChain:
    """The untrained patches of a joint, as `PatchChain.description` told them.

    Args:
        descriptions: a list of at least one; it may come from a file.
        dim: the width of the model that they are for.

    Raises:
        InputError: as `check_descriptions` and `PatchChain`; nothing has been allocated when it is the former.
    """
    check_descriptions(descriptions, dim)
    return PatchChain(*(build_patch(description, dim=dim) for description in descriptions))


def check_descriptions(descriptions: object, dim: int | None = None) -> None:
    """Whether a joint's entry in a file is a list of descriptions, each of which passes `check_description`."""
    if not isinstance(descriptions, list):
        raise InputError(f"a joint holds a list of patches, not {reprlib.repr(descriptions)}")
    if len(descriptions) > _MOST_PATCHES:
        raise InputError(f"{len(descriptions)} patches are more than a joint can hold ({_MOST_PATCHES})")
    for description in descriptions:
        check_description(description, dim)


def check_description(description: object, dim: int | None = None) -> None:
    """Whether `build_patch` can build what is described, for a model of width ``dim`` where that is given.

    Raises:
        InputError: not a mapping, an unknown kind, fields that this kind does not have or of another type, another
            width than the model's, a rank above the width, another Hadamard matrix than this version's, an eps that is
            negative or not finite.
    """
    if not isinstance(description, Mapping):
        raise InputError(f"a patch is described by its kind and its sizes, not by {reprlib.repr(description)}")
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in PATCH_KINDS:
        raise InputError(f"unknown kind of patch {reprlib.repr(kind)}: this version knows {', '.join(PATCH_KINDS)}")
    # A constructor's annotations (strings, here) say what describes a patch; where it is made, and in which dtype, is
    # not the description's to say.
    known = {
        name: (_FIELD_TYPES[one.annotation], one.default is inspect.Parameter.empty)
        for name, one in inspect.signature(PATCH_KINDS[kind]).parameters.items()
        if one.annotation in _FIELD_TYPES
    }
    misfit = f"a description that does not fit a {kind} patch:"
    for name in description:
        if name != "kind" and name not in known:
            raise InputError(f"{misfit} it has no {reprlib.repr(name)}")
    for name, (wanted, needed) in known.items():
        if name not in description and needed:
            raise InputError(f"{misfit} {name} is missing")
        if name in description and type(description[name]) is not wanted:
            raise InputError(f"{misfit} {name} is {reprlib.repr(description[name])}, no {wanted.__name__}")
    width, rank = description["dim"], description.get("rank", 0)
    if dim is not None and width != dim:
        raise InputError(f"a {kind} patch of width {reprlib.repr(width)} does not fit a model of width {dim}")
    if width > _WIDEST:
        raise InputError(f"a {kind} patch of width {reprlib.repr(width)}: no model is wider than {_WIDEST}")
    _check_size(width, rank, least_rank=int("rank" in known and known["rank"][1]))
    _check_rank(rank, width)
    if "eps" in description:
        _check_eps(description["eps"])
    if "order" in known:
        # Where a switch says whether there is an H at all, it is off unless the description has it on.
        turned = description.get("hadamard", "hadamard" not in known)
        _check_order(width, description.get("order", 0), bounded_order(width) or 0 if turned else 0)


def nearest_low_rank(matrix: Tensor, rank: int, second_moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(down [d, r], up [r, d])`` that minimise ``||X @ (matrix - down @ up)||_F``, for ``X.T @ X = second_moments``.

    The best ``down @ up`` is ``matrix @ V @ V.T``, V the r leading eigenvectors of ``matrix.T @ second_moments @
    matrix`` (Eckart-Young for ``X @ matrix``; reduced-rank regression, Izenman 1975). The columns of ``down`` and the
    rows of ``up`` have equal norms, so that a later training step or a cast to bfloat16 treats them alike.

    Args:
        matrix: [d, d], float64.
        rank: r in [0, d].
        second_moments: [d, d]; None: the identity, which makes it the Frobenius norm of the difference.

    Raises:
        InputError: a rank that is not in [0, d]; moments of another shape or not positive definite.
    """
    _check_rank(rank, len(matrix))
    moments = _check_moments(second_moments, matrix)
    spread = matrix.mT @ matrix if moments is None else matrix.mT @ moments @ matrix
    leading = torch.linalg.eigh((spread + spread.mT) / 2).eigenvectors.flip(1)[:, :rank]
    down = matrix @ leading
    balance = down.norm(dim=0).clamp_min(1e-12).sqrt()
    return down / balance, leading.mT * balance.unsqueeze(1)


def nearest_diagonal_plus_low_rank(
    matrix: Tensor, rank: int, second_moments: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(diagonal [d], down [d, r], up [r, d])`` that minimise ``||X @ (matrix - diag(diagonal) - down @ up)||_F``, for
    ``X.T @ X = second_moments``.

    For rank 0 the minimum is ``diagonal[i] = (C @ matrix)[i, i] / C[i, i]``, C the moments. For a rank the problem is
    not convex, and this is block coordinate descent: ``down`` for given ``up`` and diagonal, then ``up``, then the
    diagonal, each in closed form, so that the norm never rises. It starts from rank 0 and a fixed random subspace and
    ends at a stationary point: when a round takes less than 1e-12 of ``||X @ matrix||^2`` off, or after 500 rounds. A
    round costs O(d^2 r).

    Args:
        matrix: [d, d], float64.
        rank: r in [0, d].
        second_moments: [d, d]; None: the identity, which makes it the Frobenius norm of the difference.

    Raises:
        InputError: as `nearest_low_rank`.
    """
    d = matrix.shape[0]
    _check_rank(rank, d)
    moments = _check_moments(second_moments, matrix)
    if moments is None:
        moments = torch.eye(d, dtype=matrix.dtype, device=matrix.device)
    root = torch.linalg.cholesky(moments).mT
    # Row i of `own` dotted with column i of a matrix R, over C[i, i]: the best entry of the diagonal for R.
    own = moments / moments.diagonal().unsqueeze(1)
    diagonal = (own * matrix.mT).sum(1)
    if rank == 0:
        return diagonal, matrix.new_empty(d, 0), matrix.new_empty(0, d)
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(rank, d, generator=generator, dtype=torch.float64, device="cpu").to(matrix)
    seen = root @ matrix
    enough = 1e-12 * float(seen.square().sum())
    before = float("inf")
    for _ in range(500):
        rest = seen - root * diagonal
        basis = torch.linalg.qr(rest @ up.mT)[0]
        up = basis.mT @ rest
        down = torch.linalg.solve_triangular(root, basis, upper=True)
        diagonal = (own * (matrix - down @ up).mT).sum(1)
        error = float((seen - root * diagonal - basis @ up).square().sum())
        if before - error <= enough:
            break
        before = error
    left, values, right = torch.linalg.svd(up, full_matrices=False)
    return diagonal, down @ left * values.sqrt(), values.sqrt()[:, None] * right


def _in_hadamard_domain(matrix: Tensor) -> Tensor:
    """H.T @ matrix @ H in float64."""
    return hadamard_transform(hadamard_transform(matrix.detach().double()).mT).mT


def _check_moments(second_moments: Tensor | None, matrix: Tensor) -> Tensor | None:
    if second_moments is None:
        return None
    moments = second_moments.detach().to(matrix)
    if moments.shape != matrix.shape:
        raise InputError(f"second moments {list(moments.shape)} do not fit a matrix {list(matrix.shape)}: give X.T @ X")
    if int(torch.linalg.cholesky_ex(moments).info) != 0:
        raise InputError(
            "second moments that are not positive definite: give those of more tokens, or add some of the identity"
        )
    return moments


def _empty_low_rank(
    dim: int, rank: int, device: torch.device | str | None, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """``down`` random with about unit rows of x @ down, ``up`` zero: nothing at first, and trainable."""
    down = torch.empty(dim, rank, device=device, dtype=dtype).normal_(std=dim**-0.5)
    return nn.Parameter(down), nn.Parameter(torch.zeros(rank, dim, device=device, dtype=dtype))


def _check_size(dim: int, rank: int = 0, *, least_rank: int = 0) -> None:
    if dim < 1 or rank < least_rank:
        raise InputError(
            f"a patch needs a width of at least 1 and a rank of at least {least_rank}, not {dim} and {rank}"
        )


def _check_order(dim: int, order: int, expected: int) -> None:
    if order != expected:
        raise InputError(
            f"a patch of width {dim} that was made with a Hadamard matrix of order {order or 'unknown'} is another map"
            f" with this version's, of order {hadamard_order(dim)}: make it again, or use the version that made it"
        )


def _check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise InputError(f"the eps of a norm is a finite number from 0 on, not {eps}")


def _check_square(matrix: Tensor, rank: int = 0, *, least_rank: int = 0) -> int:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.dtype.is_floating_point:
        raise InputError(f"a patch is made from a floating matrix [d, d], not {matrix.dtype} {list(matrix.shape)}")
    _check_rank(rank, len(matrix), least_rank)
    return len(matrix)


def _check_rank(rank: int, width: int, least_rank: int = 0) -> None:
    if not least_rank <= rank <= width:
        raise InputError(f"a rank must be in [{least_rank}, {width}], the width, not {rank}")


class TopKKLLoss(nn.Module):
    """`linearpatch_kernels.topk_kl_loss` with its options fixed.

    Raises:
        InputError: there is no such option.
    """

    impl: str = "auto"  # of the class as well, for losses that were pickled without one

    def __init__(self, normalization: str = "topk", temperature: float = 1.0, *, impl: str = "auto") -> None:
        super().__init__()
        check_options(normalization, temperature)
        self.normalization, self.temperature, self.impl = normalization, temperature, impl

    def forward(self, logits: Tensor, teacher_probs: Tensor, teacher_ids: Tensor) -> Tensor:
        return topk_kl_loss(
            logits,
            teacher_probs,
            teacher_ids,
            normalization=self.normalization,
            temperature=self.temperature,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        named = f", impl={self.impl!r}" if self.impl != "auto" else ""
        return f"normalization={self.normalization!r}, temperature={self.temperature}{named}"


class LinearTopKKLLoss(TopKKLLoss):
    """`linearpatch_kernels.linear_topk_kl_loss` with its options fixed: takes the head's input and weight."""

    def __init__(
        self,
        normalization: str = "topk",
        temperature: float = 1.0,
        softcap: float | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(normalization, temperature, impl=impl)
        check_options(normalization, temperature, softcap)
        self.softcap = softcap

    def forward(  # type: ignore[override]  # the same options, other inputs
        self, hidden: Tensor, weight: Tensor, teacher_probs: Tensor, teacher_ids: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return linear_topk_kl_loss(
            hidden,
            weight,
            teacher_probs,
            teacher_ids,
            bias=bias,
            normalization=self.normalization,
            temperature=self.temperature,
            softcap=self.softcap,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", softcap={self.softcap}" if self.softcap is not None else "")
