"""The patch operators in Triton, for NVIDIA and AMD GPUs; the maths, and what may differ from it, is in `reference`.

A row is ``blocks`` independent pieces of ``m * 2**k`` elements. A program holds whole pieces in registers, as tiles
[rows, tile, 2**k] of the [rows, m, 2**k] that they are (m padded to full tiles by zeros), and goes over the rows of the
grid's stride. The order of the steps is what makes it fast:

* the power-of-two part is butterflies over groups of index bits. A group's butterflies are free of data movement where
  its bits are numbered within a thread; `_butterflies` brings a group's bits to the front, so that Triton's default
  layout puts them there, and everything between two groups is a renumbering that costs nothing. So there is one
  exchange through shared memory from group to group.
* the groups of the way back run in the opposite order, so that the result is where the row was loaded, and the scale is
  loaded once per program in the layout that the middle of the palindrome has.
* H_m is a product of small matrices. Its entries are exact in bfloat16; a float32 is the exact sum of three bfloat16s,
  so three products on the matrix units, summed in float32, lose nothing.

Low-rank terms, float64, and widths whose blocks are too small or too wide for this are left to plain PyTorch.
"""

# Triton's functions have types of their own, and no unpacking of tuples.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from linearpatch_kernels.hadamard import factor_order, paley_factor
from linearpatch_kernels.ops.hadamard_patch.reference import (
    _check_norm_operands,
    _check_out,
    _check_out_is_apart,
    _check_patch_operands,
    add_patch_rms_norm_reference,
    hadamard_patch_backward_reference,
    hadamard_patch_reference,
)
from linearpatch_kernels.ops.overlap import apart, same_elements

INTERPRETED = bool(triton.knobs.runtime.interpret)


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _butterflies(x, LOW: tl.constexpr, COUNT: tl.constexpr):
    """``x @ S`` (unnormalised) over the index bits LOW .. LOW + COUNT - 1 of the last axis."""
    SIZE: tl.constexpr = x.numel
    REST: tl.constexpr = SIZE >> COUNT
    y = tl.reshape(x, [REST >> LOW, 1 << COUNT, 1 << LOW])
    y = tl.reshape(tl.permute(y, [1, 0, 2]), [1 << COUNT, REST])
    for _ in tl.static_range(COUNT):
        a, b = tl.split(tl.permute(tl.reshape(y, [2, 1 << (COUNT - 1), REST]), [1, 2, 0]))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [1 << COUNT, REST])
    y = tl.permute(tl.reshape(y, [1 << COUNT, REST >> LOW, 1 << LOW]), [1, 0, 2])
    return tl.reshape(y, x.shape)


@triton.jit
def _sylvester(tiles, GROUPS: tl.constexpr):
    """`_butterflies` over several groups of bits, ``(low, count, low, count, ...)``, of every tile."""
    done = ()
    for i in tl.static_range(len(tiles)):
        x = tiles[i]
        for group in tl.static_range(len(GROUPS) // 2):
            x = _butterflies(x, GROUPS[2 * group], GROUPS[2 * group + 1])
        done = done + (x,)
    return done


@triton.jit
def _paley(tiles, h_ptr, TRANSPOSED: tl.constexpr, DOT: tl.constexpr):
    """``x @ H_m`` (``x @ H_m.T`` if TRANSPOSED) over the middle axis; one tile alone of one row is a power of two."""
    COUNT: tl.constexpr = len(tiles)
    ROWS: tl.constexpr = tiles[0].shape[0]
    TILE: tl.constexpr = tiles[0].shape[1]
    COLUMNS: tl.constexpr = tiles[0].shape[2]
    if TILE == 1:
        return tiles
    else:  # Triton compiles what follows a return
        parts = ()
        for i in tl.static_range(COUNT):
            x = tl.reshape(tl.permute(tiles[i], [1, 0, 2]), [TILE, ROWS * COLUMNS])
            high = x.to(tl.bfloat16)
            rest = x - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            parts = parts + (low.to(DOT), middle.to(DOT), high.to(DOT))
        index = tl.arange(0, TILE)
        done = ()
        for j in tl.static_range(COUNT):
            y = tl.zeros([TILE, ROWS * COLUMNS], tl.float32)
            for i in tl.static_range(COUNT):
                to, of = j * TILE + index[:, None], i * TILE + index[None, :]
                entry = to * (COUNT * TILE) + of if TRANSPOSED else of * (COUNT * TILE) + to
                h = tl.load(h_ptr + entry).to(DOT)
                for part in tl.static_range(3):
                    y = tl.dot(h, parts[3 * i + part], y)
            done = done + (tl.permute(tl.reshape(y, [TILE, ROWS, COLUMNS]), [1, 0, 2]),)
        return done


@triton.jit
def _load_rows(
    pointer, first, stride, rows, block, M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Rows ``first ..`` as tiles [ROWS, TILE, 2**K] in float32, zeros where there is nothing."""
    row = first + tl.arange(0, ROWS)[:, None, None]
    tiles = ()
    for i in tl.static_range(TILES):
        part = i * TILE + tl.arange(0, TILE)[None, :, None]
        offset = row.to(tl.int64) * stride + (block * (M << K) + (part << K) + tl.arange(0, 1 << K)[None, None, :])
        if TILE == 1:
            tiles = tiles + (tl.load(pointer + offset, mask=row < rows, other=0.0).to(tl.float32),)
        else:
            tiles = tiles + (tl.load(pointer + offset, mask=(row < rows) & (part < M), other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _store_rows(pointer, tiles, first, stride, rows, block, M: tl.constexpr, K: tl.constexpr):
    ROWS: tl.constexpr = tiles[0].shape[0]
    TILE: tl.constexpr = tiles[0].shape[1]
    row = first + tl.arange(0, ROWS)[:, None, None]
    for i in tl.static_range(len(tiles)):
        part = i * TILE + tl.arange(0, TILE)[None, :, None]
        offset = row.to(tl.int64) * stride + (block * (M << K) + (part << K) + tl.arange(0, 1 << K)[None, None, :])
        y = tiles[i].to(pointer.dtype.element_ty)
        if TILE == 1:
            tl.store(pointer + offset, y, mask=row < rows)
        else:
            tl.store(pointer + offset, y, mask=(row < rows) & (part < M))


@triton.jit
def _load_vector(
    pointer, factor, block, M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """``vector * factor``, the same for every row, where `_load_rows` has the rows."""
    tiles = _load_rows(pointer, 0, 0, ROWS, block, M, K, ROWS, TILE, TILES)
    done = ()
    for i in tl.static_range(TILES):
        done = done + (tiles[i] * factor,)
    return done


@triton.jit
def _load_scale(
    pointer, factor, block, M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``scale * factor`` where the last group of butterflies leaves the rows."""
    if TILE != 1 or len(GROUPS) == 0:
        return _load_vector(pointer, factor, block, M, K, ROWS, TILE, TILES)
    else:
        LOW: tl.constexpr = GROUPS[len(GROUPS) - 2]
        COUNT: tl.constexpr = GROUPS[len(GROUPS) - 1]
        REST: tl.constexpr = (ROWS << K) >> COUNT
        inside = tl.arange(0, 1 << COUNT)[:, None]
        rest = tl.arange(0, REST)[None, :]
        # By `&` and `|`, whose contiguity the compiler does not follow: it would choose a layout for wide loads.
        above = (rest >> LOW) & ((1 << (K - COUNT - LOW)) - 1)
        offset = (above << (LOW + COUNT)) | (inside << LOW) | (rest & ((1 << LOW) - 1))
        scale = tl.load(pointer + (block << K) + offset).to(tl.float32) * factor
        scale = tl.permute(tl.reshape(scale, [1 << COUNT, REST >> LOW, 1 << LOW]), [1, 0, 2])
        return (tl.reshape(scale, [ROWS, 1, 1 << K]),)


@triton.jit
def _times(tiles, others):
    done = ()
    for i in tl.static_range(len(tiles)):
        done = done + (tiles[i] * others[i],)
    return done


@triton.jit
def _times_vector(tiles, pointer, block, M: tl.constexpr, K: tl.constexpr):
    """Rows times a vector, which None stands for ones of. Read for every row: held, it would cost registers."""
    if pointer is None:
        return tiles
    else:
        ROWS: tl.constexpr = tiles[0].shape[0]
        return _times(tiles, _load_vector(pointer, 1.0, block, M, K, ROWS, tiles[0].shape[1], len(tiles)))


@triton.jit
def _plus_product(sums, tiles, others):
    done = ()
    for i in tl.static_range(len(tiles)):
        done = done + (sums[i] + tiles[i] * others[i],)
    return done


@triton.jit
def _zeros_like(tiles):
    done = ()
    for i in tl.static_range(len(tiles)):
        done = done + (tl.zeros(tiles[i].shape, tl.float32),)
    return done


@triton.jit
def _store_sum(pointer, sums, factor, part, width, block, M: tl.constexpr, K: tl.constexpr):
    """``factor`` times the sum of a program's rows as row ``part`` of [programs, width]."""
    done = ()
    for i in tl.static_range(len(sums)):
        done = done + (tl.sum(sums[i], axis=0, keep_dims=True) * factor,)
    _store_rows(pointer, done, part, width, part + 1, block, M, K)


@triton.jit
def _add_to_sum(pointer, tiles, others, factor, part, width, block, M: tl.constexpr, K: tl.constexpr):
    """``factor`` times the product's sum, added to row ``part`` of [programs, width]."""
    TILE: tl.constexpr = tiles[0].shape[1]
    before = _load_rows(pointer, part, width, part + 1, block, M, K, 1, TILE, len(tiles))
    done = ()
    for i in tl.static_range(len(tiles)):
        done = done + (before[i] + tl.sum(tiles[i] * others[i], axis=0, keep_dims=True) * factor,)
    _store_rows(pointer, done, part, width, part + 1, block, M, K)


# Else 1, multiples of 16 and other numbers of rows would each be compiled, in the middle of serving or of a capture.
@triton.jit(do_not_specialize=["rows"])
def hadamard_patch_kernel(
    x_ptr, residual_ptr, scale_ptr, pre_ptr, post_ptr, weight_ptr, h_ptr, y_ptr, normed_ptr,
    rows, x_stride, residual_stride, y_stride, eps,
    M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    THERE: tl.constexpr, BACK: tl.constexpr, DOT: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """y, and with ``residual`` and ``weight`` the norm of it; grid (programs, blocks)."""
    block = tl.program_id(1)
    if HELD:
        scale = _load_scale(scale_ptr, 1.0 / (M << K), block, M, K, ROWS, TILE, TILES, THERE)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        x = _load_rows(x_ptr, first, x_stride, rows, block, M, K, ROWS, TILE, TILES)
        if residual_ptr is not None:
            other = _load_rows(residual_ptr, first, residual_stride, rows, block, M, K, ROWS, TILE, TILES)
            z = ()
            for i in tl.static_range(TILES):
                z = z + (x[i] + other[i],)
            x = z
        u = _paley(_sylvester(_times_vector(x, pre_ptr, block, M, K), THERE), h_ptr, False, DOT)
        if not HELD:
            scale = _load_scale(scale_ptr, 1.0 / (M << K), block, M, K, ROWS, TILE, TILES, THERE)
        y = _sylvester(_paley(_times(u, scale), h_ptr, True, DOT), BACK)
        y = _times_vector(y, post_ptr, block, M, K)
        _store_rows(y_ptr, y, first, y_stride, rows, block, M, K)
        if weight_ptr is not None:
            squares = tl.zeros([ROWS], tl.float32)
            for i in tl.static_range(TILES):
                # Not of a reshaped tile: there Triton before 3.9 gives a whole row to one thread, and LLVM no end.
                squares += tl.sum(tl.sum(y[i] * y[i], axis=2), axis=1)
            inverse = tl.rsqrt(squares / (M << K) + eps)
            normed = ()
            for i in tl.static_range(TILES):
                normed = normed + (y[i] * inverse[:, None, None],)
            normed = _times_vector(normed, weight_ptr, block, M, K)
            _store_rows(normed_ptr, normed, first, y_stride, rows, block, M, K)


@triton.jit(do_not_specialize=["rows"])
def hadamard_patch_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, pre_ptr, post_ptr, h_ptr, dx_ptr, dscale_ptr, dpre_ptr, dpost_ptr,
    rows, grad_stride, x_stride, width,
    M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    THERE: tl.constexpr, BACK: tl.constexpr, DOT: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """dx, and each program's sums of dscale, dpre and dpost over its rows; grid (programs, blocks).

    The sums are added to what is there, but for dscale's where HELD.
    """
    block, part = tl.program_id(1), tl.program_id(0)
    factor: tl.constexpr = 1.0 / (M << K)
    if HELD:
        scale = _load_scale(scale_ptr, factor, block, M, K, ROWS, TILE, TILES, THERE)
        dscale = _zeros_like(scale)
    for first in range(part * ROWS, rows, tl.num_programs(0) * ROWS):
        if dscale_ptr is not None or dpost_ptr is not None:
            x = _load_rows(x_ptr, first, x_stride, rows, block, M, K, ROWS, TILE, TILES)
            u = _paley(_sylvester(_times_vector(x, pre_ptr, block, M, K), THERE), h_ptr, False, DOT)
        if dpost_ptr is not None:
            if not HELD:
                scale = _load_scale(scale_ptr, factor, block, M, K, ROWS, TILE, TILES, THERE)
            w = _sylvester(_paley(_times(u, scale), h_ptr, True, DOT), BACK)
            dy = _load_rows(grad_ptr, first, grad_stride, rows, block, M, K, ROWS, TILE, TILES)
            _add_to_sum(dpost_ptr, dy, w, 1.0, part, width, block, M, K)
        if dx_ptr is not None or dscale_ptr is not None or dpre_ptr is not None:
            dy = _load_rows(grad_ptr, first, grad_stride, rows, block, M, K, ROWS, TILE, TILES)
            a = _paley(_sylvester(_times_vector(dy, post_ptr, block, M, K), THERE), h_ptr, False, DOT)
        if dscale_ptr is not None:
            if HELD:
                dscale = _plus_product(dscale, a, u)
            else:
                _add_to_sum(dscale_ptr, a, u, factor, part, width, block, M, K)
        if dx_ptr is not None or dpre_ptr is not None:
            if not HELD:
                scale = _load_scale(scale_ptr, factor, block, M, K, ROWS, TILE, TILES, THERE)
            b = _sylvester(_paley(_times(a, scale), h_ptr, True, DOT), BACK)
            if dpre_ptr is not None:
                x = _load_rows(x_ptr, first, x_stride, rows, block, M, K, ROWS, TILE, TILES)
                _add_to_sum(dpre_ptr, b, x, 1.0, part, width, block, M, K)
            if dx_ptr is not None:
                _store_rows(dx_ptr, _times_vector(b, pre_ptr, block, M, K), first, width, rows, block, M, K)
        if dpre_ptr is not None or dpost_ptr is not None or not HELD:
            tl.debug_barrier()  # the sums are read again for the next row
    if HELD and dscale_ptr is not None:
        _store_sum(dscale_ptr, dscale, factor, part, width, block, M, K)


# --- which kernel for which width ------------------------------------------------------------------------------------

SMALLEST_ORDER, LARGEST_ORDER, MOST_TILES = 64, 32768, 5

# Elements of a row that a thread holds: the most that the static model finds without spills for the forward
# (`python benchmarks/gpu_static.py --rank`; modelled). Sixteen make one exchange more.
VALUES = 32
# Of a program whose threads may have all the registers that there can be. A wider row is held by as many threads with
# more elements each: twice the threads would each have half the registers, of which what is not a row's takes as many.
ROOMY_THREADS = 256
# One stage: prefetching rows into shared memory would take more of it than most GPUs have.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Layout:
    """How a width is held: ``m * 2**k`` as ``tiles`` tiles [rows, tile, 2**k] over ``warps`` warps of ``lanes``."""

    d: int
    m: int
    k: int
    tile: int
    tiles: int
    rows: int
    warps: int
    lanes: int

    @property
    def blocks(self) -> int:
        return self.d // (self.m << self.k)

    # What a thread's registers hold was found by compiling (`tools.gpu_model`) with Triton 3.6, 3.7 and 3.9.

    @property
    def roomy(self) -> bool:
        """Whether there are registers for more than the row itself."""
        return (self.rows * self.tile * self.tiles << self.k) <= VALUES * ROOMY_THREADS

    def holds_scale(self, alone: bool) -> bool:
        """Whether scale stays in registers from row to row, and dscale's sums; alone: no other vector is needed."""
        return self.roomy and (self.m == 1 or alone)

    def backward_launches(self, vectors: bool) -> tuple[bool, tuple[tuple[int, ...], ...]]:
        """Whether scale is held, and what each launch makes of dx, dscale, dpre, dpost; vectors: either of the last."""
        crowded = self.m > 1 and self.warps * self.lanes >= ROOMY_THREADS
        together = self.roomy and not (vectors and crowded)
        return self.holds_scale(alone=False) and not vectors, ((0, 1, 2, 3),) if together else ((0,), (1,), (2,), (3,))

    def groups(self, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Groups of index bits, ``(low, count, ...)``, for the way there and the way back.

        A row is loaded 16 bytes a thread: the lowest bits number those, the next ones the threads, and what is left is
        within a thread again. The threads' bits make one group, or as many as are within a thread at a time.
        """
        threads = self.lanes * self.warps
        wide = min(self.k, (16 // itemsize).bit_length() - 1)
        across = min(self.k - wide, threads.bit_length() - 1)
        upper = wide + across
        values = max(2, (self.rows * self.tile << self.k) // threads)
        count = -(-across // (values.bit_length() - 1))
        cuts = [wide + across * i // max(count, 1) for i in range(count + 1)]
        middle = [(low, high - low) for low, high in pairwise(cuts)]
        low, high = (0, wide), (upper, self.k - upper)

        def flat(groups: list[tuple[int, int]]) -> tuple[int, ...]:
            return tuple(number for group in groups if group[1] for number in group)

        return flat([low, high, *middle]), flat([*reversed(middle), low, high])

    def constants(self, itemsize: int, held: bool) -> dict[str, Any]:
        there, back = self.groups(itemsize)
        sizes = {"M": self.m, "K": self.k, "ROWS": self.rows, "TILE": self.tile, "TILES": self.tiles}
        # The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
        return sizes | {
            "THERE": there,
            "BACK": back,
            "DOT": tl.float32 if INTERPRETED else tl.bfloat16,
            "HELD": held,
        }


def _power_of_two(most: int) -> int:
    return 1 << max(most, 1).bit_length() - 1


@cache
def layout_of(d: int, lanes: int = 32, rows: int | None = None, warps: int | None = None) -> Layout | None:
    """The layout for width d, or None where plain PyTorch has to do it."""
    m, k = factor_order(d) if d else (0, 0)
    if not SMALLEST_ORDER <= m << k <= LARGEST_ORDER:
        return None
    fitting = [tile for tile in (64, 32, 16) if tile * MOST_TILES >= m]
    if m > 1 and not fitting:
        return None
    tile = 1 if m == 1 else min(fitting, key=lambda tile: -(-m // tile) * tile)
    tiles = -(-m // tile)
    size = tile * tiles << k
    if rows is None:
        at_least = 16 >> k if m > 1 else 1  # a product of matrices needs 16 columns
        rows = max(_power_of_two(32 * VALUES // size), at_least, 1)
    if warps is None:
        values = VALUES if rows * size <= VALUES * ROOMY_THREADS else 2 * VALUES
        warps = _power_of_two(rows * size // values // lanes)
    return Layout(d, m, k, tile, tiles, rows, warps, lanes)


@cache
def _tiled_factor(d: int, size: int, device: torch.device) -> Tensor:
    """H_m, padded by zeros to [size, size]."""
    factor, _ = paley_factor(d)
    with torch.inference_mode(False):
        return pad(factor, [0, size - len(factor)] * 2).to(device, torch.bfloat16)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type == "cpu":
        return 4 * LARGEST_ORDER
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 2
    return 4 * int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- host code -------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _vector(vector: Tensor | None) -> Tensor | None:
    if vector is None:
        return None
    return (vector.float() if vector.dtype == torch.float64 else vector).contiguous()


def registers(threads: int) -> dict[str, int]:
    """The option that bounds a thread's registers, by 65536 a multiprocessor; AMD's compiler has none.

    For kernels of which NVIDIA's assembler, left alone, spills some bytes to have one more program run at a time.
    """
    return {} if torch.version.hip else {"maxnreg": min(255, 65536 // threads)}


def _launch(kernel: Any, layout: Layout, held: bool, x: Tensor, *arguments: Any, **options: Any) -> None:
    with torch.cuda.device_of(x):
        kernel[(_grid(layout, x), layout.blocks)](
            *arguments, **layout.constants(x.element_size(), held), num_warps=layout.warps, **OPTIONS, **options
        )


def _grid(layout: Layout, x: Tensor) -> int:
    return min(-(-x.numel() // (layout.d * layout.rows)), _programs(x.device))


def _factor(layout: Layout, device: torch.device) -> Tensor | None:
    return None if layout.m == 1 else _tiled_factor(layout.d, layout.tile * layout.tiles, device)


def _layout(x: Tensor) -> Layout | None:
    layout = None if x.dtype == torch.float64 else layout_of(x.shape[-1], 64 if torch.version.hip else 32)
    exchanged = 4 * layout.rows * layout.tile << layout.k if layout else 0
    return layout if exchanged <= _shared_memory(x.device) else None


def serves(device: str, width: int) -> bool:
    """Whether the kernels have rows of this width on such a device."""
    return _layout(torch.empty(0, width, dtype=torch.float32, device=device)) is not None


def _patch(
    layout: Layout,
    x: Tensor,
    scale: Tensor,
    optional: tuple[Tensor | None, ...],
    y: Tensor,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    normed: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """One launch of `hadamard_patch_kernel`; y and normed are contiguous and may be of another dtype than x."""
    if not x.numel():
        return
    rows, others = _rows(x), None if residual is None else _rows(residual)
    pre, post = optional[:2]
    vector = pre is not None or post is not None
    held = layout.holds_scale(alone=not vector and weight is None)
    # The others are left to the assembler: where it may take all registers, it takes a fourth more than they need.
    spills = not layout.roomy or (vector and layout.m > 1)
    bound = registers(layout.warps * layout.lanes) if spills else {}
    vectors = (_vector(scale), _vector(pre), _vector(post), _vector(weight))
    strides = (rows.stride(0), 0 if others is None else others.stride(0), layout.d)
    _launch(
        hadamard_patch_kernel, layout, held, rows,
        rows, others, *vectors, _factor(layout, x.device), y, normed, len(rows), *strides, eps,
        **bound,
    )  # fmt: skip


def _kernel_rounds(x: Tensor) -> bool:
    """Not so for bfloat16 in the interpreter, which truncates where a GPU takes the nearest."""
    return not (INTERPRETED and x.dtype == torch.bfloat16)


def _kernel_output(x: Tensor, *, final: bool = True) -> Tensor:
    """What a kernel writes rows like x's to: rounded to x's dtype if they are final."""
    return x.new_empty(x.shape, dtype=x.dtype if final and _kernel_rounds(x) else torch.float32)


def _low_rank(x: Tensor, optional: tuple[Tensor | None, ...]) -> Tensor | None:
    down, up = optional[2:]
    return None if down is None or up is None else (x.float() @ down.float()) @ up.float()


def hadamard_patch(x: Tensor, scale: Tensor, *optional: Tensor | None) -> Tensor:
    """The operator ``linearpatch::hadamard_patch``; the low-rank term is added by PyTorch."""
    _check_patch_operands(x, scale, *optional)
    if (layout := _layout(x)) is None:
        pre, post, down, up = optional
        return hadamard_patch_reference(x, scale, pre_scale=pre, post_scale=post, down=down, up=up).contiguous()
    more = _low_rank(x, optional)
    y = _kernel_output(x, final=more is None)
    _patch(layout, x, scale, optional, y)
    return (y if more is None else y.add_(more)).to(x.dtype)


def hadamard_patch_out(x: Tensor, scale: Tensor, *others: Any) -> None:
    """The operator ``linearpatch::hadamard_patch_out``; a row is read whole before it is written."""
    *optional, out = others
    _check_out(x, out)
    _check_patch_operands(x, scale, *optional)
    _check_out_is_apart(out, scale, *optional)
    layout, pre, post, down, _ = _layout(x), *optional
    safe = same_elements(x, out) or apart(x, out)
    if layout is not None and down is None and safe and _kernel_rounds(x) and out.is_contiguous():
        _patch(layout, x, scale, (pre, post), out)
    else:
        out.copy_(hadamard_patch(x, scale, *optional))


def add_patch_rms_norm(
    x: Tensor, residual: Tensor, scale: Tensor, norm_weight: Tensor, eps: float, *optional: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The operator ``linearpatch::add_patch_rms_norm``; the norm is PyTorch's where a row is not one block."""
    if (layout := _layout(x)) is None:
        return add_patch_rms_norm_reference(x, residual, scale, norm_weight, eps, *optional)
    _check_patch_operands(x, scale, *optional)
    _check_norm_operands(x, residual, norm_weight)
    if layout.blocks == 1 and optional[2] is None:
        y, normed = _kernel_output(x), _kernel_output(x)
        _patch(layout, x, scale, optional, y, residual=residual, weight=norm_weight, normed=normed, eps=eps)
        return normed.to(x.dtype), y.to(x.dtype)
    y = _kernel_output(x, final=False)
    _patch(layout, x, scale, optional, y, residual=residual)
    if (more := _low_rank(x.float() + residual.float(), optional)) is not None:
        y += more
    normed = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    return normed.to(x.dtype), y.to(x.dtype)


def hadamard_patch_backward(
    grad: Tensor, x: Tensor, scale: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``linearpatch::hadamard_patch_backward``, deterministic: every program sums its own rows."""
    *optional, needs = others
    if (layout := _layout(x)) is None or not x.numel():
        return hadamard_patch_backward_reference(grad, x, scale, *others)
    pre, post, down, up = optional
    wanted = [operand is not None and bool(needs >> i & 1) for i, operand in enumerate((x, scale, *optional))]
    rows, dy = _rows(x), _rows(grad)
    dx = _kernel_output(x, final=down is None) if wanted[0] else None
    held, launches = layout.backward_launches(wanted[2] or wanted[3])
    shape = (_grid(layout, x), layout.d)
    sums = [
        (rows.new_empty if held and i == 0 else rows.new_zeros)(shape, dtype=torch.float32) if wants else None
        for i, wants in enumerate(wanted[1:4])
    ]
    vectors = (_vector(scale), _vector(pre), _vector(post))
    strides = (len(rows), dy.stride(0), rows.stride(0), layout.d)
    for numbers in launches:
        made = [result if i in numbers else None for i, result in enumerate((dx, *sums))]
        if any(result is not None for result in made):
            _launch(
                hadamard_patch_backward_kernel, layout, held, rows,
                dy, rows, *vectors, _factor(layout, x.device), *made, *strides,
                **registers(layout.warps * layout.lanes),
            )  # fmt: skip
    ddown, dup = (rows.new_empty(0, dtype=torch.float32) for _ in range(2))
    dscale, dpre, dpost = (ddown.clone() if part is None else part.sum(0) for part in sums)
    if down is not None and up is not None:
        rows, dy = rows.float(), dy.float()
        lowered = dy @ up.float().mT
        dx = dx if dx is None else dx + (lowered @ down.float().mT).reshape(x.shape)
        ddown = rows.mT @ lowered if wanted[4] else ddown
        dup = (rows @ down.float()).mT @ dy if wanted[5] else dup
    return x.new_empty(0) if dx is None else dx.to(x.dtype), dscale, dpre, dpost, ddown, dup
