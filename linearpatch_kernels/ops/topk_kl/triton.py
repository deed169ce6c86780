"""The kernels of the losses in Triton, for NVIDIA and AMD GPUs; `gpu` makes the losses of them.

The linear loss over the slots is one program a token, which reads the rows of its slots once: dhidden is
``sum_k (S q_k - p_k) w_k``, and both of its sums are carried along, the first one relative to the largest z so far, as
an online softmax does. Rows wider than 16384 are left to plain PyTorch.
"""

# Triton's functions have types of their own, and no unpacking of tuples.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Numbers of rows and slots are not specialised: each class of them (1, a multiple of 16, any other) would be compiled
# anew, in the middle of training. ``size`` and ``first`` are: they follow the vocabulary alone, and a row whose end is
# not known to be a multiple of 16 is read number by number.


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _finite(largest):
    """What is taken off before exp while numbers are summed up: the largest one, or 0 where that is infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def _weight_of(before, after, inverse):
    """By what sums of ``exp((z - before) / T)`` become sums relative to ``after``; both are largest numbers."""
    return tl.where(before == float("-inf"), 0.0, tl.exp((_finite(before) - _finite(after)) * inverse))


@triton.jit
def _load_slots(weight_ptr, ids, readable, stride, first, width, CHUNK: tl.constexpr):
    """Columns ``first ..`` of the rows that the ids name."""
    columns = first + tl.arange(0, CHUNK)[None, :]
    mask = readable[:, None] & (columns < width)
    return tl.load(weight_ptr + ids[:, None] * stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["slots", "vocabulary"])
def slots_kernel(
    hidden_ptr, weight_ptr, bias_ptr, probs_ptr, ids_ptr, scale_ptr, z_ptr, dhidden_ptr,
    slots, width, vocabulary, hidden_stride, weight_stride, inverse,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The slots' z of a token, and with ``dhidden`` its gradient for "topk"; grid (tokens,).

    HELD: the hidden state stays in registers, and so does a row until its z is known; else both are read again.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    hidden_row = hidden_ptr + token * hidden_stride
    hidden, student, teacher = (), (), ()
    for i in tl.static_range(CHUNKS):
        if HELD:
            column = i * CHUNK + columns
            hidden = hidden + (tl.load(hidden_row + column, mask=column < width, other=0.0).to(tl.float32),)
        student = student + (tl.zeros([SLOTS, CHUNK], tl.float32),)
        teacher = teacher + (tl.zeros([SLOTS, CHUNK], tl.float32),)
    largest = tl.full([SLOTS], float("-inf"), tl.float32)
    sums, totals = tl.zeros([SLOTS], tl.float32), tl.zeros([SLOTS], tl.float32)
    present = tl.zeros([SLOTS], tl.int32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        inside = slot < slots
        ids = tl.load(ids_ptr + token * slots + slot, mask=inside, other=-1).to(tl.int64)
        readable = (ids >= 0) & (ids < vocabulary)
        rows = ()
        z = tl.zeros([SLOTS], tl.float32)
        for i in tl.static_range(CHUNKS):
            row = _load_slots(weight_ptr, ids, readable, weight_stride, i * CHUNK, width, CHUNK)
            if HELD:
                rows = rows + (row,)
                z += tl.sum(row * hidden[i][None, :], axis=1)
            else:
                column = i * CHUNK + columns
                h = tl.load(hidden_row + column, mask=column < width, other=0.0).to(tl.float32)
                z += tl.sum(row * h[None, :], axis=1)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + ids, mask=readable, other=0.0).to(tl.float32)
        z = tl.where(ids < vocabulary, z, float("nan"))
        tl.store(z_ptr + token * slots + slot, z, mask=inside)
        if dhidden_ptr is not None:
            p = tl.load(probs_ptr + token * slots + slot, mask=ids >= 0, other=0.0).to(tl.float32)
            z = tl.where(ids >= 0, z, float("-inf"))
            now = tl.maximum(largest, z)
            kept, e = _weight_of(largest, now, inverse), tl.exp((z - _finite(now)) * inverse)
            sums = sums * kept + e
            totals += p
            present |= (ids >= 0).to(tl.int32)
            largest = now
            carried, taught = (), ()
            for i in tl.static_range(CHUNKS):
                if HELD:
                    row = rows[i]
                else:
                    row = _load_slots(weight_ptr, ids, readable, weight_stride, i * CHUNK, width, CHUNK)
                carried = carried + (student[i] * kept[:, None] + row * e[:, None],)
                taught = taught + (teacher[i] + row * p[:, None],)
            student, teacher = carried, taught
    if dhidden_ptr is not None:
        kept = _weight_of(largest, tl.max(largest, axis=0), inverse)
        factor = kept * (tl.sum(totals, axis=0) / tl.sum(sums * kept, axis=0))
        scale = tl.load(scale_ptr)
        counted = tl.max(present, axis=0) > 0
        for i in tl.static_range(CHUNKS):
            column = i * CHUNK + columns
            gradient = tl.sum(student[i] * factor[:, None] - teacher[i], axis=0) * scale
            tl.store(dhidden_ptr + token * width + column, tl.where(counted, gradient, 0.0), mask=column < width)


@triton.jit(do_not_specialize=["slots"])
def token_kernel(
    z_ptr, probs_ptr, ids_ptr, rest_ptr, scale_ptr, loss_ptr, normalizers_ptr, dz_ptr, factor_ptr, slots, inverse,
    WHOLE: tl.constexpr, TAIL: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Loss, (m, s, m', s'), dz of the slots, factor of the rest's ``exp((z - m') / T)``; grid (tokens,).

    WHOLE: (m', s') of the rest is given, (m, s) are over the vocabulary, and a token's ids are in ascending order.
    """
    token = tl.program_id(0).to(tl.int64)
    largest = tl.full([], float("-inf"), tl.float32)
    sums, total, present = 0.0, 0.0, 0
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        ids = tl.load(ids_ptr + token * slots + slot, mask=slot < slots, other=-1)
        z = tl.load(z_ptr + token * slots + slot, mask=ids >= 0, other=float("-inf"))
        total += tl.sum(tl.load(probs_ptr + token * slots + slot, mask=ids >= 0, other=0.0).to(tl.float32), axis=0)
        present = tl.maximum(present, tl.max((ids >= 0).to(tl.int32), axis=0))
        if WHOLE:
            previous = tl.load(ids_ptr + token * slots + slot - 1, mask=(slot > 0) & (slot < slots), other=-1)
            z = tl.where(ids == previous, float("-inf"), z)
        now = tl.maximum(largest, tl.max(z, axis=0))
        sums = sums * _weight_of(largest, now, inverse) + tl.sum(tl.exp((z - _finite(now)) * inverse), axis=0)
        largest = now
    rest_largest, rest_sum = tl.full([], float("-inf"), tl.float32), 0.0
    if WHOLE:
        rest_largest, rest_sum = tl.load(rest_ptr + 2 * token), tl.load(rest_ptr + 2 * token + 1)
        now = tl.maximum(largest, rest_largest)
        sums = sums * _weight_of(largest, now, inverse) + rest_sum * _weight_of(rest_largest, now, inverse)
        largest = now
    scale, log_sum = tl.load(scale_ptr), tl.log(sums)
    t, loss = 0.0, 0.0
    if TAIL:
        t = tl.where(rest_sum == 0.0, 0.0, tl.maximum(1.0 - total, 0.0))
        log_r = (rest_largest - largest) * inverse + (tl.log(rest_sum) - log_sum)
        loss = tl.where(t == 0.0, 0.0, t * (tl.log(t) - log_r))
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        ids = tl.load(ids_ptr + token * slots + slot, mask=slot < slots, other=-1)
        z = tl.load(z_ptr + token * slots + slot, mask=ids >= 0, other=float("-inf"))
        p = tl.load(probs_ptr + token * slots + slot, mask=ids >= 0, other=0.0).to(tl.float32)
        z = (z - largest) * inverse
        loss += tl.sum(tl.where(p == 0.0, 0.0, p * (tl.log(p) - (z - log_sum))), axis=0)
        if dz_ptr is not None:
            student = (total + t) / sums * tl.exp(z)
            if WHOLE:
                previous = tl.load(ids_ptr + token * slots + slot - 1, mask=(slot > 0) & (slot < slots), other=-1)
                student = tl.where(ids == previous, 0.0, student)
            dz = tl.where(ids >= 0, (student - p) * scale, 0.0)
            tl.store(dz_ptr + token * slots + slot, dz, mask=slot < slots)
    tl.store(loss_ptr + token, tl.where(present > 0, loss, 0.0))
    tl.store(normalizers_ptr + 4 * token, largest)
    tl.store(normalizers_ptr + 4 * token + 1, sums)
    tl.store(normalizers_ptr + 4 * token + 2, rest_largest if TAIL else float("-inf"))
    tl.store(normalizers_ptr + 4 * token + 3, rest_sum if TAIL else 0.0)
    if factor_ptr is not None:
        factor = (total + t) / sums * tl.exp((rest_largest - largest) * inverse) - t / rest_sum
        nothing = (present == 0) | (rest_sum == 0.0)
        tl.store(factor_ptr + token, tl.where(nothing, 0.0, factor * scale))


@triton.jit(do_not_specialize=["rows"])
def combine_rows_kernel(
    rows_ptr, index_ptr, factors_ptr, starts_ptr, old_factors_ptr, out_ptr, sums_ptr, rows, width, stride,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``out[r] = sum of factors[i] * rows[index[i]]`` over ``starts[r] <= i < starts[r + 1]``; grid (results, chunks).

    With old_factors, plus ``old_factors[r] * out[r]``. ``sums[r]`` are those of the factors alone. An index outside of
    [0, rows) adds nothing.
    """
    result = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    end = tl.load(starts_ptr + result + 1)
    combined = tl.zeros([SLOTS, CHUNK], tl.float32)
    sums = tl.zeros([SLOTS], tl.float32)
    for first in range(tl.load(starts_ptr + result), end, SLOTS):
        place = first + tl.arange(0, SLOTS)
        factor = tl.load(factors_ptr + place, mask=place < end, other=0.0)
        sums += factor
        if out_ptr is not None:
            index = tl.load(index_ptr + place, mask=place < end, other=-1).to(tl.int64)
            there = ((index >= 0) & (index < rows))[:, None] & (column < width)[None, :]
            row = tl.load(rows_ptr + index[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
            combined += row * factor[:, None]
    if out_ptr is not None:
        total = tl.sum(combined, axis=0)
        if old_factors_ptr is not None:
            old = tl.load(old_factors_ptr + result)
            # Not read where it counts nothing: an ignored token may hold anything.
            counted = tl.where(old == 0.0, 0, width)
            total += old * tl.load(out_ptr + result * width + column, mask=column < counted, other=0.0)
        tl.store(out_ptr + result * width + column, total, mask=column < width)
    if sums_ptr is not None:
        tl.store(sums_ptr + result, tl.sum(sums, axis=0), mask=tl.program_id(1) == 0)


@triton.jit
def _block(logits_ptr, bias_ptr, offset, columns, size, first):
    """z of a row's columns, -inf beyond the last."""
    z = tl.load(logits_ptr + offset + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + first + columns, mask=columns < size, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["slots", "blocks"])
def vocabulary_kernel(
    logits_ptr, bias_ptr, ids_ptr, bounds_ptr, z_ptr, rest_ptr, exp_ptr, dhidden_ptr,
    slots, width, first, size, stride, blocks, inverse,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Logits [tokens, size] of the ids ``first ..``: their slots' z, and the rest into (m', s'); grid (tokens,).

    With ``exp``, the logits are overwritten and exp is ``exp((z - m') / T)`` of the rest, and what dhidden has so far
    is made relative to the new m'. bounds[token, b] is how many of a token's ascending ids are below ``b * BLOCK``.
    """
    token = tl.program_id(0).to(tl.int64)
    offset = token * stride
    largest, sum_before = tl.load(rest_ptr + 2 * token), tl.load(rest_ptr + 2 * token + 1)
    before = largest
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _block(logits_ptr, bias_ptr, offset, columns, size, first)
        bound = bounds_ptr + token * (blocks + 1) + (first + start) // BLOCK
        for k in range(tl.load(bound), tl.load(bound + 1)):
            column = tl.load(ids_ptr + token * slots + k).to(tl.int32) - first
            one = tl.load(logits_ptr + offset + column).to(tl.float32)
            if bias_ptr is not None:
                one += tl.load(bias_ptr + first + column).to(tl.float32)
            z = tl.where(columns == column, float("-inf"), z)
            tl.store(z_ptr + token * slots + k, one)
        if exp_ptr is not None:
            tl.debug_barrier()  # the slots' logits have been read
            tl.store(logits_ptr + offset + columns, z, mask=columns < size)
        now = tl.maximum(largest, tl.max(z, axis=0))
        sums = sums * _weight_of(largest, now, inverse) + tl.exp((z - _finite(now)) * inverse)
        largest = now
    kept = _weight_of(before, largest, inverse)
    tl.store(rest_ptr + 2 * token, largest)
    tl.store(rest_ptr + 2 * token + 1, sum_before * kept + tl.sum(sums, axis=0))
    if exp_ptr is not None:
        tl.debug_barrier()
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + offset + columns, mask=columns < size, other=float("-inf"))
            e = tl.exp((z - _finite(largest)) * inverse)
            tl.store(exp_ptr + offset + columns, e.to(exp_ptr.dtype.element_ty), mask=columns < size)
        if kept != 1.0:
            for start in range(0, width, CHUNK):
                column = start + tl.arange(0, CHUNK)
                place = dhidden_ptr + token * width + column
                tl.store(place, kept * tl.load(place, mask=column < width, other=0.0), mask=column < width)


@triton.jit(do_not_specialize=["slots", "blocks"])
def vocabulary_gradient_kernel(
    logits_ptr, bias_ptr, probs_ptr, ids_ptr, bounds_ptr, normalizers_ptr, scale_ptr, dlogits_ptr,
    slots, first, size, stride, out_stride, blocks, inverse,
    WHOLE: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """From (m, s, m', s'), the gradient of logits [tokens, size] of the ids ``first ..``; grid (tokens, blocks)."""
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    total, present = 0.0, 0
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        ids = tl.load(ids_ptr + token * slots + slot, mask=slot < slots, other=-1)
        total += tl.sum(tl.load(probs_ptr + token * slots + slot, mask=ids >= 0, other=0.0).to(tl.float32), axis=0)
        present = tl.maximum(present, tl.max((ids >= 0).to(tl.int32), axis=0))
    largest, sums = tl.load(normalizers_ptr + 4 * token), tl.load(normalizers_ptr + 4 * token + 1)
    rest_largest, rest_sum = tl.load(normalizers_ptr + 4 * token + 2), tl.load(normalizers_ptr + 4 * token + 3)
    t = 0.0
    if TAIL:
        t = tl.where(rest_sum == 0.0, 0.0, tl.maximum(1.0 - total, 0.0))
    student = tl.zeros([BLOCK], tl.float32)
    gradient = tl.zeros([BLOCK], tl.float32)
    if WHOLE:
        z = _block(logits_ptr, bias_ptr, token * stride, columns, size, first)
        student = (total + t) / sums * tl.exp((z - largest) * inverse)
        gradient = student
        if TAIL:
            gradient -= tl.where(t == 0.0, 0.0, t / rest_sum * tl.exp((z - rest_largest) * inverse))
    bound = bounds_ptr + token * (blocks + 1) + (first + start) // BLOCK
    begin, end = tl.load(bound), tl.load(bound + 1)
    if TAIL:
        for k in range(begin, end):
            column = tl.load(ids_ptr + token * slots + k).to(tl.int32) - first
            gradient = tl.where(columns == column, student, gradient)
    for k in range(begin, end):
        column = tl.load(ids_ptr + token * slots + k).to(tl.int32) - first
        change = -tl.load(probs_ptr + token * slots + k).to(tl.float32)
        if not WHOLE:
            z = tl.load(logits_ptr + token * stride + column).to(tl.float32)
            change += total / sums * tl.exp((z - largest) * inverse)
        gradient += tl.where(columns == column, change, 0.0)
    gradient = tl.where(present > 0, gradient * tl.load(scale_ptr), 0.0)
    tl.store(dlogits_ptr + token * out_stride + columns, gradient.to(dlogits_ptr.dtype.element_ty), mask=columns < size)


# --- sizes -----------------------------------------------------------------------------------------------------------

WIDEST, WIDEST_HELD = 16384, 8192
BLOCK = 2048  # of the vocabulary, in one program at a time
CHUNK = 1024  # of a row of dhidden
WARPS = 4  # of the kernels over the vocabulary
# One stage: what is loaded is met in registers.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Layout:
    """How rows of a width are held: ``chunks`` times ``chunk`` columns, ``slots`` rows at a time, over ``warps``."""

    chunk: int
    chunks: int
    slots: int
    warps: int
    held: bool

    @property
    def constants(self) -> dict[str, Any]:
        return {"SLOTS": self.slots, "CHUNK": self.chunk, "CHUNKS": self.chunks, "HELD": self.held}


@cache
def layout_of(width: int, slots: int, lanes: int = 32) -> Layout | None:
    """For `slots_kernel`: 32 numbers of the rows a thread, a row's in at most 16 of them; None for too wide a row.

    Of a row that takes all threads that there can be, a thread's registers hold no more than its two sums.
    """
    if width > WIDEST:
        return None
    held = width <= WIDEST_HELD
    whole = max(16, triton.next_power_of_2(width)) if held else 4096
    fitting = (whole >> i for i in range(max(1, whole.bit_length() - 6)))  # down to 64
    chunk = next((chunk for chunk in fitting if -(-width // chunk) * chunk <= 9 * width // 8), whole)
    chunks = -(-width // chunk)
    numbers = 1 << (chunk * chunks).bit_length() - 1
    warps = min(max(numbers // ((16 if held else 32) * lanes), 1), 1024 // lanes)
    together = max(2, 32 * lanes * warps // numbers) if held else 1
    if INTERPRETED:
        together *= 8
    return Layout(chunk, chunks, min(together, max(2, triton.next_power_of_2(slots))), warps, held)


def slots_at_once(slots: int) -> int:
    """Slots of a token that a program looks at together, where it needs none of their rows."""
    return max(2, min(1024, triton.next_power_of_2(slots)))


def token_warps(slots: int) -> int:
    return min(4, max(1, slots_at_once(slots) // 32))


def combine_layout(width: int) -> tuple[dict[str, int], int]:
    """Constants and warps of `combine_rows_kernel`."""
    chunk = min(1024, max(16, triton.next_power_of_2(width)))
    return {"SLOTS": 4, "CHUNK": chunk}, max(1, chunk // 256)


# --- host code: what `gpu` calls -------------------------------------------------------------------------------------


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, num_warps=warps, **OPTIONS)


def _registers(most: int) -> dict[str, int]:
    """Left alone, NVIDIA's assembler spills a few of them to have one more program run at a time."""
    return {} if torch.version.hip else {"maxnreg": most}


def _layout(width: int, slots: int) -> Layout | None:
    return layout_of(width, slots, 64 if torch.version.hip else 32)


def serves(width: int) -> bool:
    return _layout(width, 1) is not None


def readable(rows: Tensor) -> Tensor:
    """The same rows where the kernels can read them."""
    return rows if rows.stride(1) == 1 or rows.shape[1] < 2 else rows.contiguous()


def writable(dtype: torch.dtype) -> torch.dtype:
    """The interpreter truncates to bfloat16 where a GPU takes the nearest."""
    return torch.float32 if INTERPRETED else dtype


def slots(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, probs: Tensor, ids: Tensor, scale: Tensor, temperature: float,
    z: Tensor, dhidden: Tensor | None,
) -> None:  # fmt: skip
    """The slots' z of every token; with dhidden, its gradient for "topk"."""
    layout = _layout(hidden.shape[1], ids.shape[1])
    assert layout is not None
    _launch(
        slots_kernel, (len(hidden),), hidden, weight, bias, probs, ids, scale, z, dhidden, ids.shape[1],
        hidden.shape[1], len(weight), hidden.stride(0), weight.stride(0), 1 / temperature, **layout.constants,
        warps=layout.warps,
    )  # fmt: skip


def tokens(
    z: Tensor, probs: Tensor, ids: Tensor, rest: Tensor | None, scale: Tensor, temperature: float, tail: bool,
    losses: Tensor, normalizers: Tensor, dz: Tensor | None, factors: Tensor | None,
) -> None:  # fmt: skip
    """A token's loss, (m, s, m', s'), and gradients, from its slots' z, and (m', s') of the rest of the vocabulary.

    With a rest, the ids of a token ascend. factors [N] are what to multiply a rest of dhidden with.
    """
    _launch(
        token_kernel, (len(z),), z, probs, ids, rest, scale, losses, normalizers, dz, factors, z.shape[1],
        1 / temperature, WHOLE=rest is not None, TAIL=tail, SLOTS=slots_at_once(z.shape[1]),
        warps=token_warps(z.shape[1]),
    )  # fmt: skip


def combine(
    rows: Tensor, index: Tensor, factors: Tensor, starts: Tensor, old_factors: Tensor | None, out: Tensor | None,
    sums: Tensor | None,
) -> None:  # fmt: skip
    """``out[r] = sum of factors[i] * rows[index[i]]`` over ``starts[r] <= i < starts[r + 1]``; sums are the factors'.

    With old_factors [R], plus ``old_factors[r] * out[r]``. An index outside of the rows adds nothing.
    """
    width = rows.shape[1]
    constants, warps = combine_layout(width)
    _launch(
        combine_rows_kernel, (len(starts) - 1, 1 if out is None else -(-width // constants["CHUNK"])),
        rows, index, factors, starts, old_factors, out, sums, len(rows), width, rows.stride(0),
        **constants, warps=warps,
    )  # fmt: skip


def carry(
    logits: Tensor, size: int, bias: Tensor | None, ids: Tensor, bounds: Tensor, first: int, temperature: float,
    z: Tensor, rest: Tensor, exp: Tensor | None, dhidden: Tensor | None,
) -> None:  # fmt: skip
    """Logits [N, size], the vocabulary's from ``first`` on: their slots' z, and the rest into (m', s').

    With exp and dhidden, the logits are overwritten, exp is ``exp((z - m') / T)`` of the rest, and what dhidden has so
    far is made relative to the new m'. ids ascend, and bounds [N, b] are how many are below ``b * BLOCK``.
    """
    width = 0 if dhidden is None else dhidden.shape[1]
    _launch(
        vocabulary_kernel, (len(ids),), logits, bias, ids, bounds, z, rest, exp, dhidden, ids.shape[1], width, first,
        size, logits.stride(0), bounds.shape[1] - 1, 1 / temperature, BLOCK=BLOCK, CHUNK=CHUNK, warps=WARPS,
        **_registers(128),
    )  # fmt: skip


def differentiate(
    logits: Tensor, size: int, bias: Tensor | None, probs: Tensor, ids: Tensor, bounds: Tensor, first: int,
    temperature: float, normalizers: Tensor, scale: Tensor, tail: bool, dlogits: Tensor, whole: bool = True,
) -> None:  # fmt: skip
    """The gradient of the logits [N, size] from (m, s, m', s'), times scale; ``whole`` as for "full" and "tail"."""
    _launch(
        vocabulary_gradient_kernel, (len(ids), -(-size // BLOCK)), logits, bias, probs, ids, bounds, normalizers, scale,
        dlogits, ids.shape[1], first, size, logits.stride(0), dlogits.stride(0), bounds.shape[1] - 1, 1 / temperature,
        WHOLE=whole, TAIL=tail, BLOCK=BLOCK, SLOTS=slots_at_once(ids.shape[1]), warps=WARPS,
    )  # fmt: skip
