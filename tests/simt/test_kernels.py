"""The CUDA kernels of the patch, run on the CPU by the emulator: against float64, in several orders of threads."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from linearpatch_kernels.hadamard import hadamard_order
from tests.simt.emulator import H100, KIB, ONE_BLOCK, RTX, SCHEDULES, Emulator
from tests.support.cpu_cases import DTYPES, LAYOUTS, LISTED, check, rows_of

REFERENCE = torch.ops.linearpatch
SIMT = torch.ops.linearpatch_simt
POWERS = [128, 256]
BLOCK_DIAGONAL = [3 * 128, 5 * 512, 7 * 192]
WIDE = [10240, 24576, 32768]
SOME = [128, 384, 512, 576, 640, 768, 896, 1024, 1600, 2048, 2880, 3072, 4096, 8192]


def double(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.double() for tensor in tensors)


def held_to_float64(
    d: int, dtype: torch.dtype, rows: int, chance: random.Random, *, layout: str = "contiguous", rank: int = 0
) -> list[str]:
    """Every operator once, each result by the error rule; what is wrong, one line each."""
    x, grad = rows_of((rows, d), dtype, layout), torch.randn(rows, d).to(dtype)
    parameter = chance.choice([torch.float32, dtype, torch.float64])
    scale, pre, post, weight = (torch.randn(d).to(parameter) for _ in range(4))
    pre, post = (v if chance.random() < 0.7 else None for v in (pre, post))
    down, up = (torch.randn(d, rank) / d**0.5, torch.randn(rank, d)) if rank else (None, None)
    operands = (scale, pre, post, down, up)
    exact, reference = (REFERENCE.hadamard_patch_reference(*given) for given in (double(x, *operands), (x, *operands)))
    wrong = check("patch", (SIMT.hadamard_patch(x, *operands),), (reference,), (exact,))
    y = x.clone(memory_format=torch.preserve_format)
    SIMT.hadamard_patch_out(y, *operands, y)
    wrong += check("patch in place", (y,), (reference,), (exact,))
    needs = chance.randint(1, 15) | (48 if rank else 0)
    wrong += check(
        f"gradients {needs:06b}",
        SIMT.hadamard_patch_backward(grad, x, *operands, needs),
        REFERENCE.hadamard_patch_backward_reference(grad, x, *operands, needs),
        REFERENCE.hadamard_patch_backward_reference(*double(grad, x, *operands), needs),
    )
    wrong += check(
        "norm",
        SIMT.add_patch_rms_norm(x, grad, scale, weight, 1e-3, *operands[1:]),
        REFERENCE.add_patch_rms_norm_reference(x, grad, scale, weight, 1e-3, *operands[1:]),
        REFERENCE.add_patch_rms_norm_reference(*double(x, grad, scale, weight), 1e-3, *double(*operands[1:])),
    )
    return wrong


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "widths",
    [SOME, pytest.param([*POWERS, *LISTED, *BLOCK_DIAGONAL, *WIDE], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_every_operator_against_float64(
    emulator: Emulator, widths: list[int], dtype: torch.dtype, schedule: str
) -> None:
    for d in widths:
        chance = random.Random(d)
        for gpu in (ONE_BLOCK, H100):
            emulator.configure(schedule, seed=d, gpu=gpu)
            rows = chance.randint(1, 2) if d > 2000 or gpu is H100 else chance.randint(2, 12)
            assert not held_to_float64(d, dtype, rows, chance), f"d {d}, {rows} rows"
            assert not emulator.faults(), f"d {d}, {rows} rows"
            assert emulator.seen().launches >= 3, f"d {d} went to the reference"


@pytest.mark.parametrize("d", [1024, 2048, 4096, 8192])
def test_powers_of_two_have_kernels_of_their_own(emulator: Emulator, d: int) -> None:
    """Many rows a block, the last turn with fewer rows than the block has places; two exchanges, so two barriers.

    They are those of the row's threads, or of the warp where it has several rows; what the block fills is one.
    """
    for dtype in DTYPES:
        if (d, dtype) == (1024, torch.float32):
            continue
        emulator.configure("random", seed=d)
        x, scale = torch.randn(21 if d < 4096 else 7, d).to(dtype), torch.randn(d)
        # With channel scales the kernel for 8192 would spill on sm_120: the one for any width has those rows.
        SIMT.hadamard_patch(x, scale, None if d == 8192 else scale, None, None, None)
        seen = emulator.seen()
        assert seen.fixed
        assert not seen.warp_rows
        assert not emulator.faults()
        turns = -(-len(x) // seen.rows_together)
        assert turns > 1
        assert seen.barriers == seen.blocks
        rows_in_a_warp = max(1, 32 * seen.rows_together // seen.threads)
        assert seen.narrow_barriers == 2 * -(-len(x) // rows_in_a_warp)
        assert seen.shuffles == 0


@pytest.mark.parametrize("d", [576, 896, 1536, 2560, 3072, 3584, 5120])
def test_widths_of_models_have_kernels_of_their_own(emulator: Emulator, d: int) -> None:
    """In 16 bits; against float64, with and without the channel scales, the last turn with fewer rows than places."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        emulator.configure("random", seed=d)
        x, scale = torch.randn(17 if d < 1000 else 5, d).to(dtype), torch.randn(d)
        for operands in ((scale, None, None, None, None), (scale, scale + 1, scale - 1, None, None)):
            y = SIMT.hadamard_patch(x, *operands)
            exact = REFERENCE.hadamard_patch_reference(*double(x, *operands))
            assert not check("patch", (y,), (REFERENCE.hadamard_patch_reference(x, *operands),), (exact,))
            assert emulator.seen().fixed == (dtype != torch.float32)
        assert emulator.seen().narrow_barriers > 2
        assert not emulator.faults()


WARP_ROWS = [1024, 2048, 3072, 4096, 5120, 6144, 8192]
ROWS_AT_ONCE = {1024: 24, 2048: 16, 3072: 12, 4096: 8, 5120: 8, 6144: 4, 8192: 4}


def gpu_of_warps(rows: int, d: int, *, fused: bool) -> tuple[int, int, int]:
    """One processor, whose shared memory has room for the tables of a width and for so many rows at once."""
    return (1, (8 if fused else 4) * d + 32 * fused * (d > 5120) + rows * 4 * d, 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("d", WARP_ROWS)
def test_a_warp_has_a_row(emulator: Emulator, d: int, schedule: str) -> None:
    """In 16 bits, without channel scales: several turns, in the last one some warps have no row; no bank conflicts."""
    for dtype in (torch.float16, torch.bfloat16):
        wavefronts, together = [], min(6, ROWS_AT_ONCE[d])
        for turns in (2, 3.5, 5.5):
            rows = int(turns * together)
            gpu = gpu_of_warps(together, d, fused=False)
            emulator.configure(schedule, seed=d, gpu=gpu, count_wavefronts=schedule == "forward")
            wide = (torch.randn(rows, d + 72) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
            x, operands = wide[:, 8 : d + 8], (torch.randn(d), None, None, None, None)
            references = REFERENCE.hadamard_patch_reference(x, *operands)
            exact = REFERENCE.hadamard_patch_reference(*double(x, *operands))
            y = SIMT.hadamard_patch(x, *operands)
            untouched = wide.clone()
            SIMT.hadamard_patch_out(x, *operands, x)
            for i in range(rows):
                assert not check(f"row {i}", (y[i],), (references[i],), (exact[i],))
            assert x.equal(y)
            assert wide[:, :8].equal(untouched[:, :8])
            assert wide[:, d + 8 :].equal(untouched[:, d + 8 :])
            assert not emulator.faults()
            seen = emulator.seen()
            assert seen.warp_rows
            assert seen.barriers == 2
            assert seen.rows_together == together
            wavefronts.append(seen)
        _, two, three = wavefronts
        assert three.products - two.products == 2 * 2 * together * 14 * d // 256
        assert three.wavefronts - two.wavefronts == three.least_wavefronts - two.least_wavefronts


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("d", WARP_ROWS)
def test_a_warp_has_a_row_and_its_norm(emulator: Emulator, d: int, schedule: str) -> None:
    """As above, with x and the residual in places and of sizes of their own, and weights of every type."""
    for dtype, parameter in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        wavefronts, together = [], min(5, ROWS_AT_ONCE[d])
        for turns in (2, 3.5, 5.5):
            rows = int(turns * together)
            gpu = gpu_of_warps(together, d, fused=True)
            emulator.configure(schedule, seed=d, gpu=gpu, count_wavefronts=schedule == "forward")
            sizes = torch.logspace(-3, 3, rows)[:, None]
            x = (torch.randn(rows, d + 72) * sizes).to(dtype)[:, 8 : d + 8]
            residual = (torch.randn(rows, d + 16) * sizes.flip(0)).to(dtype)[:, 16:]
            scale, weight = torch.randn(d), torch.randn(d).to(parameter)
            nothing = (None, None, None, None)
            results = SIMT.add_patch_rms_norm(x, residual, scale, weight, 1e-3, *nothing)
            references = REFERENCE.add_patch_rms_norm_reference(x, residual, scale, weight, 1e-3, *nothing)
            exact = REFERENCE.add_patch_rms_norm_reference(*double(x, residual, scale, weight), 1e-3, *nothing)
            for i in range(rows):
                assert not check(f"row {i}", *([one[i] for one in of] for of in (results, references, exact)))
            assert not emulator.faults()
            seen = emulator.seen()
            assert seen.warp_rows
            assert seen.barriers == 1
            assert seen.rows_together == together
            wavefronts.append(seen)
        _, two, three = wavefronts
        more = 2 * together
        assert three.products - two.products == more * 16 * d // 256
        assert three.shuffles - two.shuffles == more * 5 * (2 if d > 5120 else 1)
        assert three.wavefronts - two.wavefronts == three.least_wavefronts - two.least_wavefronts


@pytest.mark.parametrize("fused", [False, True], ids=["patch", "norm"])
@pytest.mark.parametrize("d", WARP_ROWS)
def test_few_rows_are_for_many_threads(emulator: Emulator, d: int, fused: bool) -> None:
    """A warp gets a row to itself where each that the GPU holds has two: with fewer the time of one row counts."""
    at_once = ROWS_AT_ONCE[d]
    x, v = torch.randn(4 * at_once, d).bfloat16(), torch.randn(d)
    for processors in (1, 2):
        enough = 2 * processors * at_once
        for rows in (1, enough - 1, enough):
            emulator.configure(gpu=(processors, *H100[1:]))
            if fused:
                SIMT.add_patch_rms_norm(x[:rows], x[-rows:], v, v, 1e-3, None, None, None, None)
            else:
                SIMT.hadamard_patch(x[:rows], v, None, None, None, None)
            seen = emulator.seen()
            assert seen.launches == 1
            assert seen.warp_rows == (rows == enough), (processors, rows)
            assert not emulator.faults()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", WARP_ROWS)
def test_what_is_not_finite_is_as_in_pytorch(emulator: Emulator, d: int, dtype: torch.dtype) -> None:
    """Inf and NaN where the reference has them, not only anywhere in their row; next to the range's end, no Inf."""
    inf, largest = float("inf"), torch.finfo(dtype).max
    x, scale = torch.randn(9, d).to(dtype), torch.rand(d) + 0.5
    for row, places in enumerate([{5: inf}, {d - 1: -inf}, {7: inf, 300: inf}, {0: inf, 1: -inf}, {9: float("nan")}]):
        for i, value in places.items():
            x[row, i] = value
    x[5] = inf
    x[6, 3] = largest
    x[7, d // 2], x[7, d // 2 + 1] = largest / 4, -largest / 4
    infinite = scale.clone()
    infinite[d // 3 | 1] = inf  # whose sum of the two largest numbers is no difference
    residual, weight = x.flip(0), torch.randn(d)
    for vector in (scale, infinite):
        nothing = (None, None, None, None)
        emulator.configure(gpu=gpu_of_warps(4, d, fused=False))
        results = [SIMT.hadamard_patch(x, vector, *nothing)]
        assert emulator.seen().warp_rows
        references = [REFERENCE.hadamard_patch_reference(x, vector, *nothing)]
        assert references[0].isinf().any()
        assert not emulator.faults()
        emulator.configure(gpu=gpu_of_warps(4, d, fused=True))
        for other in (residual, torch.randn(9, d).to(dtype)):
            results += SIMT.add_patch_rms_norm(x, other, vector, weight, 1e-3, *nothing)
            assert emulator.seen().warp_rows
            references += REFERENCE.add_patch_rms_norm_reference(x, other, vector, weight, 1e-3, *nothing)
        for result, reference in zip(results, references, strict=True):
            for name in ("isnan", "isposinf", "isneginf"):
                assert getattr(result, name)().equal(getattr(reference, name)()), name
        assert not emulator.faults()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_wherever_they_lie(emulator: Emulator, layout: str) -> None:
    for d, dtype in ((256, torch.float32), (576, torch.bfloat16), (2048, torch.float16)):
        assert not held_to_float64(d, dtype, 5, random.Random(1), layout=layout)
    assert not emulator.faults()
    assert emulator.seen().launches > 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_term(emulator: Emulator, dtype: torch.dtype) -> None:
    assert not held_to_float64(576, dtype, 5, random.Random(2), rank=3)
    assert not held_to_float64(1024, dtype, 9, random.Random(3), rank=16)
    assert not emulator.faults()
    assert emulator.seen().launches >= 4


def test_three_leading_dimensions_and_none(emulator: Emulator) -> None:
    scale = torch.randn(256)
    x = torch.randn(3, 4, 2, 256)
    for rows in (x, x[1:, :2], x.transpose(0, 1), x[0, 0, 0], x[:0]):
        y = SIMT.hadamard_patch(rows, scale, None, None, None, None)
        exact = REFERENCE.hadamard_patch_reference(rows.double(), scale.double(), None, None, None, None)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)
        assert y.shape == rows.shape
    gradients = SIMT.hadamard_patch_backward(x[:0], x[:0], scale, scale, scale, None, None, 0b1111)
    assert [list(g.shape) for g in gradients] == [[0, 4, 2, 256], [256], [256], [256], [0], [0]]
    assert all(g.eq(0).all() for g in gradients)
    assert not emulator.faults()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 12, 36, 48, 64, 100, 1000, 65536])
def test_widths_without_a_kernel_go_to_the_reference(emulator: Emulator, d: int, dtype: torch.dtype) -> None:
    """Among them rows that are no whole vectors of 16 bytes, which have no stride that a kernel could take."""
    x, scale = torch.randn(2, d).to(dtype), torch.randn(d)
    operands = (scale, None, None, None, None)
    expected = REFERENCE.hadamard_patch_reference(x, *operands)
    assert SIMT.hadamard_patch(x, *operands).equal(expected)
    y = torch.empty_like(x)
    SIMT.hadamard_patch_out(x, *operands, y)
    assert y.equal(expected)
    norm = (x, x, scale, scale, 1e-3, None, None, None, None)
    pairs = zip(SIMT.add_patch_rms_norm(*norm), REFERENCE.add_patch_rms_norm_reference(*norm), strict=True)
    assert all(one.equal(other) for one, other in pairs)
    gradients = SIMT.hadamard_patch_backward(x, x, *operands, 0b11)
    reference = REFERENCE.hadamard_patch_backward_reference(x, x, *operands, 0b11)
    assert all(one.equal(other) for one, other in zip(gradients, reference, strict=True))
    assert emulator.seen().launches == 0


def test_what_does_not_fit_the_device_goes_to_the_reference(emulator: Emulator) -> None:
    x, scale = torch.randn(2, 32768), torch.randn(32768)
    for gpu, launches in ((H100, 1), (RTX, 0)):
        emulator.configure(gpu=gpu)
        SIMT.hadamard_patch(x, scale, None, None, None, None)
        assert emulator.seen().launches == launches
    for d in (16384, 24576):
        emulator.configure(gpu=RTX)
        SIMT.hadamard_patch(torch.randn(1, d), torch.randn(d), None, None, None, None)
        assert emulator.seen().launches == 1
        assert emulator.seen().shared_bytes <= 99 * KIB


def test_a_table_is_not_made_while_a_graph_is_captured(emulator: Emulator) -> None:
    """H of order 180 has no program; that of 36 has one, and nothing to copy. No other test has the first width."""
    for d, has_table in ((1440, True), (576, False)):
        x, operands = torch.randn(2, d), (torch.randn(d), None, None, None, None)
        emulator.configure(capturing=True)
        if has_table:
            with pytest.raises(RuntimeError, match="call it once, on any rows, before a CUDA graph is captured"):
                SIMT.hadamard_patch(x, *operands)
            assert emulator.seen().launches == 0
            emulator.configure()
        y = SIMT.hadamard_patch(x, *operands)
        emulator.configure(capturing=True)
        assert SIMT.hadamard_patch(x, *operands).equal(y)
        assert emulator.seen().launches == 1


def test_operands_that_are_only_read_stay_lazy_clones(emulator: Emulator) -> None:
    x, scale = torch.randn(3, 256).bfloat16(), torch.randn(256)
    x, residual, scale, pre, post, weight = (torch._lazy_clone(t) for t in (x, x, scale, scale, scale, scale))
    SIMT.hadamard_patch(x, scale, pre, post, None, None)
    SIMT.hadamard_patch_out(x, scale, pre, post, None, None, torch.empty_like(x))
    SIMT.hadamard_patch_backward(residual, x, scale, pre, post, None, None, 0b1111)
    SIMT.add_patch_rms_norm(x, residual, scale, weight, 1e-3, pre, post, None, None)
    assert all(torch._C._is_cow_tensor(t) for t in (x, residual, scale, pre, post, weight))
    assert emulator.seen().launches >= 5


def test_bad_operands_are_refused_before_a_launch(emulator: Emulator) -> None:
    x = torch.randn(2, 256)
    with pytest.raises(RuntimeError, match="scale is not in the form that the kernel takes"):
        SIMT.hadamard_patch(x, torch.randn(255), None, None, None, None)
    with pytest.raises(RuntimeError, match="one of down and up is there without the other"):
        SIMT.hadamard_patch(x, torch.randn(256), None, None, torch.randn(256, 2), None)
    with pytest.raises(RuntimeError, match="out shares memory with pre_scale"):
        SIMT.hadamard_patch_out(x, torch.randn(256), (out := torch.empty(2, 256))[1], None, None, None, out)
    with pytest.raises(RuntimeError, match="out has two elements in one place"):
        SIMT.hadamard_patch_out(x, torch.randn(256), *[None] * 4, torch.empty(256).expand(2, 256))
    assert emulator.seen().launches == 0


@pytest.mark.parametrize("shift", [0, 8, 24, 256])
def test_out_may_overlap_x(emulator: Emulator, shift: int) -> None:
    memory = torch.randn(9 * 256)
    x, out = memory[: 4 * 256].view(4, 256), memory[shift : shift + 4 * 256].view(4, 256)
    scale = torch.randn(256)
    expected = SIMT.hadamard_patch(x.clone(), scale, None, None, None, None)
    SIMT.hadamard_patch_out(x, scale, None, None, None, None, out)
    assert out.equal(expected)
    assert not emulator.faults()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("d", [256, 576, 960, 4096])
def test_what_is_not_finite_spoils_its_row_and_no_other(emulator: Emulator, d: int, value: float) -> None:
    for dtype in DTYPES:
        x, scale = torch.randn(5, d).to(dtype), torch.rand(d) + 0.5
        clean = SIMT.hadamard_patch(x, scale, None, None, None, None)
        x[2, d // 3] = value
        y = SIMT.hadamard_patch(x, scale, None, None, None, None)
        assert not y[2].isfinite().any()
        assert y[[0, 1, 3, 4]].equal(clean[[0, 1, 3, 4]])


def test_gradients_have_the_same_bits_in_every_order(emulator: Emulator) -> None:
    x, grad = torch.randn(2, 13, 512)
    scale, pre, post = torch.randn(3, 512)
    results = []
    for schedule in SCHEDULES:
        emulator.configure(schedule, seed=5)
        results.append(SIMT.hadamard_patch_backward(grad, x, scale, pre, post, None, None, 0b1111))
    assert all(one.equal(two) for other in results[1:] for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("d", [128, 256, 512, 576, 768, 1024, 1152, 1536, 2048, 3072, 4096, 5120, 6144, 8192])
def test_shared_memory_has_no_bank_conflicts(emulator: Emulator, d: int) -> None:
    """Counted from the addresses; the filling of the scales, once a block, is outside of what is compared."""
    wavefronts = []
    for turns in (2, 3):
        emulator.configure(count_wavefronts=True)
        x = torch.randn(turns * 16, d)
        SIMT.hadamard_patch(x, torch.randn(d), None, None, None, None)
        wavefronts.append(emulator.seen())
    first, both = wavefronts
    assert hadamard_order(d) == d
    assert both.launches == 1
    assert both.wavefronts - first.wavefronts == both.least_wavefronts - first.least_wavefronts
