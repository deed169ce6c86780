"""Which orthonormal Hadamard matrix belongs to a width, and its fast transform.

``H_d = kron(H_m, S_{2^k}) / sqrt(d)``: ``S`` is Sylvester's matrix in natural order, ``H_m`` the smallest Hadamard
matrix that R. E. A. C. Paley's two constructions (*On orthogonal matrices*, 1933) give with ``d / m`` a power of two.
``H_m`` is not symmetric when it comes from the first construction, so ``H`` and ``H.T`` must not be exchanged.

The factor ``H_m`` is kept entry by entry, so m is bounded: by `LARGEST_FACTOR`, whose signs are 256 MiB. The CPU
kernels keep twice as many bytes, plain PyTorch keeps it in the dtype that it computes in: 1 GiB in float32, 2 GiB in
float64.

This file, with what it imports of this package, needs nothing but torch, because it travels inside the modeling file of
a patched checkpoint.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache, reduce
from importlib import import_module
from itertools import product
from operator import index

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.torch_internals import where_constants_are_made

# Of a factor H_m, which has m * m entries. Part of the definition: a larger m would be another matrix for some widths.
LARGEST_FACTOR = 16384

# A matrix product by a factor of up to this order costs little more than the pass over memory that it makes anyway.
_WIDEST_FACTOR = 64


# --- which order -----------------------------------------------------------------------------------------------------


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, n)`` with ``q == p**n`` and p prime, else None."""
    if q < 2:
        return None
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    n = 0
    while q % p == 0:
        q, n = q // p, n + 1
    return (p, n) if q == 1 else None


def _paley_field(m: int) -> tuple[int, bool] | None:
    """``(q, first)``: the field GF(q) of Paley's first (m = q + 1) or second (m = 2 q + 2) construction, else None."""
    if m % 4:
        return None
    if _prime_power(m - 1):
        return m - 1, True
    if (m // 2 - 1) % 4 == 1 and _prime_power(m // 2 - 1):
        return m // 2 - 1, False
    return None


def _paley_orders(m: int) -> tuple[int, ...] | None:
    """Orders of Paley matrices whose Kronecker product has order m, as few as possible, else None."""
    if _paley_field(m):
        return (m,)
    for a in range(4, math.isqrt(m) + 1, 4):
        if m % a == 0 and _paley_field(a) and (rest := _paley_orders(m // a)):
            return (a, *rest)
    return None


@cache
def _decompose(d: int, largest: int) -> tuple[int, int]:
    """``(m, k)``: the largest order that divides d and needs no m above `largest` is ``m * 2**k``, with the least m."""
    twos = (d & -d).bit_length() - 1
    odd = d >> twos
    # Whatever its m, an order takes all twos of d: the one with the largest odd part is the largest.
    for part in range(min(odd, largest // 4), 1, -1):
        if odd % part == 0:
            for power in range(2, twos + 1):
                if part << power > largest:
                    break
                if _paley_orders(part << power):
                    return part << power, twos - power
    return 1, twos


# A compiler takes the results of the functions that are marked so as constants, instead of tracing number theory.
@torch.compiler.assume_constant_result
def _order(d: int) -> tuple[int, int]:
    if d < 1:
        raise InputError(f"a Hadamard matrix needs a width of at least 1, not {d}")
    return _decompose(d, LARGEST_FACTOR)


def factor_order(d: int) -> tuple[int, int]:
    """``(m, k)`` with ``hadamard_order(d) == m * 2**k``: m is that of the small factor, at most `LARGEST_FACTOR`.

    Raises:
        InputError: d is not positive.
    """
    return _order(index(d))


def bounded_order(d: int) -> int | None:
    """The order of a width that would have a larger one, if m could be larger than `LARGEST_FACTOR`; else None.

    Asked for m up to eight times the bound: a larger matrix would not have fitted into any memory.
    """
    m, k = factor_order(d)
    return m << k if _decompose(index(d), 8 * LARGEST_FACTOR) != (m, k) else None


def hadamard_order(d: int) -> int:
    """The order of the Hadamard matrix used for width d: d itself, or the size of the diagonal blocks.

    It is d wherever ``d = m * 2**k`` with m = 1, a Paley order (``q + 1`` with q = 3 mod 4, or ``2 (q + 1)`` with
    q = 1 mod 4; q a prime or a prime power), or a product of Paley orders, and m is at most 16384: its matrix is kept
    entry by entry, 256 MiB of signs at most. Every other width takes the largest such order that divides it (2 for 6,
    1 for 7), repeated along the diagonal.

    Up to version 0.1 m had no bound, so some widths from 16412 on had a larger order. A patch that was made with it is
    refused when it is loaded, because its scale belongs to the other matrix.

    Raises:
        InputError: d is not positive.
    """
    m, k = factor_order(d)
    return m << k


# --- the matrices ----------------------------------------------------------------------------------------------------


@cache
def _quadratic_character(q: int) -> tuple[int, ...]:
    """chi[a] is 0, 1 or -1 as element a of GF(q), q = p**n odd, is zero, a square, or neither.

    An element's number is its polynomial's coefficients read as digits in base p. The powers of a primitive element
    run through all elements but zero, and the even ones are the squares.
    """
    p, n = _prime_power(q) or (q, 1)
    for modulus in product(range(p), repeat=n):  # x**n == sum(c * x**i for i, c in enumerate(modulus))
        chi = [0] * q
        power, sign = [1, *[0] * (n - 1)], 1
        for _ in range(q - 1):
            number = sum(c * p**i for i, c in enumerate(power))
            if number == 0 or chi[number]:
                break
            chi[number] = sign
            power = [(low + power[-1] * c) % p for low, c in zip([0, *power[:-1]], modulus, strict=True)]
            sign = -sign
        else:
            return tuple(chi)
    raise AssertionError(f"GF({q}) has a primitive element")


@torch.compiler.assume_constant_result
def _kronecker_orders(m: int) -> tuple[int, ...]:
    return _paley_orders(m) or ()


@torch.compiler.assume_constant_result
def _field(m: int) -> tuple[int, int, bool, tuple[int, ...]]:
    q, first = _paley_field(m) or (0, False)
    p, n = _prime_power(q) or (0, 0)
    return p, n, first, _quadratic_character(q)


def _paley_matrix(m: int, device: torch.device) -> Tensor:
    """Paley's matrix of order m, entries +-1 (int8), by operations that every tracer can follow.

    It needs at most m * m bytes beside its result.
    """
    p, n, first, chi = _field(m)
    q = p**n
    # [a_1, .., a_n, -1 - b_1, .., -1 - b_n]: chi of the element a - b, digit by digit, as views of windows of length p.
    differences = torch.tensor(chi, dtype=torch.int8, device=device).reshape([p] * n)
    for digit in range(n):
        differences = (
            torch.cat([differences, differences], digit).roll(-1, digit).unfold(digit, p, 1).narrow(digit, 0, p)
        )
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8, device=device)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if first else 1
    conference[1:, 1:] = differences.flip(list(range(n, 2 * n))).reshape(q, q)
    diagonal = conference.diagonal()  # filled so, because fill_diagonal_ cannot be functionalised
    diagonal.fill_(1)
    if first:
        return conference
    # kron(conference, [[1, 1], [1, -1]]) + kron(identity, [[1, -1], [-1, -1]])
    matrix = torch.empty(q + 1, 2, q + 1, 2, dtype=torch.int8, device=device)
    matrix[:, 0, :, 0] = conference
    matrix[:, 1, :, 1] = -conference
    diagonal.fill_(-1)
    matrix[:, 0, :, 1] = conference
    matrix[:, 1, :, 0] = conference
    return matrix.reshape(m, m)


def _signs(m: int, k: int, device: torch.device) -> Tensor:
    """``kron(H_m, S_{2^k})``, entries +-1 (int8)."""
    sylvester = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device=device)
    factors = [*(_paley_matrix(order, device) for order in _kronecker_orders(m)), *[sylvester] * k]
    return reduce(torch.kron, factors) if factors else torch.ones(1, 1, dtype=torch.int8, device=device)


def paley_factor(d: int) -> tuple[Tensor, int]:
    """The small factor of width d's matrix: ``(H_m, k)`` with ``hadamard_order(d) == m * 2**k``.

    Returns:
        ``H_m``: int8 [m, m] on the CPU, entries +-1, ``H_m @ H_m.T == m * I``; ``[[1]]`` for a power of two. ``k``.

    Raises:
        InputError: d is not positive.
    """
    m, k = factor_order(d)
    return _signs(m, 0, torch.device("cpu")), k


def hadamard_matrix(d: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """The orthonormal matrix of width d, ``H @ H.T == I``, [d, d].

    ``kron(I, H_m, S_{2^k}) / sqrt(m * 2**k)``, where the identity is of order 1 unless `hadamard_order` says that H is
    block-diagonal. Its d * d entries are for looking at and for tests; `hadamard_transform` multiplies without them.

    Raises:
        InputError: d is not positive, or dtype is not a floating one.
    """
    if not dtype.is_floating_point:
        raise InputError(f"an orthonormal matrix needs a floating dtype, not {dtype}")
    m, k = factor_order(d)
    order = m << k
    place = torch.device(device) if device is not None else torch.get_default_device()
    entry = torch.tensor(1 / math.sqrt(order), dtype=torch.float64, device="cpu").to(dtype)
    block = _signs(m, k, place).to(dtype).mul_(entry)
    if order == d:
        return block
    matrix = torch.zeros(d // order, order, d // order, order, dtype=dtype, device=place)
    matrix.diagonal(dim1=0, dim2=2).copy_(block[..., None])
    return matrix.reshape(d, d)


# --- the transform ---------------------------------------------------------------------------------------------------


def _split(m: int, k: int) -> list[tuple[int, int]]:
    """``m * 2**k`` as a Kronecker product of few factors ``(m or 1, exponent)``, each of about `_WIDEST_FACTOR`."""
    widest = _WIDEST_FACTOR.bit_length() - 1
    absorbed = 0
    if m > 1:
        room = range(1 + min(k, max(0, (_WIDEST_FACTOR // m).bit_length() - 1)))
        absorbed = min(room, key=lambda j: (math.ceil((k - j) / widest), j))
    rest = k - absorbed
    count = math.ceil(rest / widest)
    return [(m, absorbed)] * (m > 1) + [(1, (rest + i) // count) for i in range(count)]


_FACTORS: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def _factor(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal ``kron(H_m, S_{2^k}) / sqrt(m * 2**k)``."""

    def build() -> Tensor:
        return _signs(m, k, device).to(dtype).div_(math.sqrt(m << k))

    # A tensor made while a tracer or a fake-tensor mode watches belongs to it and must not outlive it, and an
    # ordinary one must not enter a trace; one made in inference mode could not be saved for a later backward.
    if torch.compiler.is_compiling() or (apart := where_constants_are_made()) is None:
        return build()
    key = (m, k, dtype, device)
    if key not in _FACTORS:
        with torch.inference_mode(False), torch.no_grad(), apart():
            _FACTORS[key] = build()
    return _FACTORS[key]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from narrowing the matrix products of code whose precision is its own business."""
    # Dynamo of torch 2.11 cannot trace the question.
    available = device.type != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


# fast-hadamard-transform, where it was asked for: what it serves, and nothing of it is imported before.
_PACKAGE = "fast-hadamard-transform"


# A function, because definitions alone travel with a checkpoint.
def _chosen() -> str | None:
    chosen = os.environ.get("LINEARPATCH_HADAMARD") or None
    if chosen not in (None, _PACKAGE):
        raise InputError(f"LINEARPATCH_HADAMARD={chosen} is not known: set it to {_PACKAGE}, or unset it")
    return chosen


_CHOSEN = _chosen()
_PACKAGE_DEVICES = ("cuda",)
_PACKAGE_ORDERS = range(8, 32768 + 1)


def _package_serves(x: Tensor, m: int) -> bool:
    if _CHOSEN is None or torch.compiler.is_compiling():
        return False
    power_of_two = m == 1 and x.shape[-1] & (x.shape[-1] - 1) == 0
    return (
        power_of_two and x.shape[-1] in _PACKAGE_ORDERS and x.device.type in _PACKAGE_DEVICES
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0
    )  # fmt: skip


def _package_transform(x: Tensor) -> Tensor:
    try:
        package = import_module(_PACKAGE.replace("-", "_"))
    except ImportError as error:
        why = " ".join(str(error).split())
        raise InputError(f"LINEARPATCH_HADAMARD={_PACKAGE} is not available ({why}): pip install {_PACKAGE}") from None
    result: Tensor = package.hadamard_transform(x, scale=1 / math.sqrt(x.shape[-1]))
    return result


def check_plain(impl: str, operator: str) -> None:
    """Raise where an implementation is named of an operator that is plain PyTorch.

    Raises:
        InputError: it is neither "auto" nor "reference".
    """
    if impl not in ("auto", "reference"):
        raise InputError(f"impl={impl!r} has no kernel of {operator}: it is plain PyTorch, impl='auto' or 'reference'")


def hadamard_transform(x: Tensor, *, inverse: bool = False, impl: str = "auto") -> Tensor:
    """``x @ H`` along the last dimension, or ``x @ H.T`` with ``inverse``, in O(d (m + log d)) per row.

    Equivalent to ``x @ hadamard_matrix(d)``, without the d x d matrix: x is viewed as [..., blocks, m, 2, ..., 2] and
    multiplied along each axis by that axis' factor, a few factors at a time.

    ``LINEARPATCH_HADAMARD=fast-hadamard-transform``, read once at import, lets that package's kernel transform what it
    covers: on NVIDIA GPUs, d a power of two from 8 to 32768, not float64, not under torch.compile.

    Args:
        x: [..., d], any floating dtype, device and strides. float32 and float64 are transformed as they are; float16
            and bfloat16 in float32, rounded once at the end. Autocast changes nothing.
        inverse: multiply by ``H.T``, which undoes ``H``.
        impl: "auto"; "reference" is plain PyTorch whatever ``LINEARPATCH_HADAMARD`` says, and no other has a kernel.

    Returns:
        [..., d] in x's dtype, a new tensor also where H is the identity (odd d). Differentiable: the gradient is the
        transform in the other direction.

    Raises:
        InputError: x is not floating or has no last dimension, the package that was asked for is not there, or impl is
            another.
    """
    check_plain(impl, "hadamard_transform")
    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise InputError(f"hadamard_transform needs a floating tensor [..., d], not {x.dtype} {list(x.shape)}")
    d = index(x.shape[-1])  # a symbolic width becomes a constant: the matrix depends on it
    m, k = _order(d)
    if impl == "auto" and _package_serves(x, m):
        return _package_transform(x)
    trailing = m << k
    if trailing == 1:  # no factor to multiply by, and callers write to what they get
        return x.clone(memory_format=torch.contiguous_format)
    y = x if x.dtype in (torch.float32, torch.float64) else x.float()
    with without_autocast(x.device):
        for order_m, exponent in _split(m, k):
            order = order_m << exponent
            trailing //= order
            factor = _factor(order_m, exponent, y.dtype, y.device)
            if trailing == 1:
                y = y.reshape(-1, order) @ (factor.T if inverse else factor)
            else:
                y = torch.matmul(factor if inverse else factor.T, y.reshape(-1, order, trailing))
    return y.reshape(x.shape).to(x.dtype)
