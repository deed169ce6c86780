"""The losses' CPU kernels: every instruction set against float64, the same bits on any threads, what is not finite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linearpatch_kernels.ops.backends import backends
from tests.support.topk_kl_cases import check, double

OPS = torch.ops.linearpatch
ROOT = Path(__file__).parents[2]
NATIVE = Path(__file__).parent / "native"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
CPUINFO = Path("/proc/cpuinfo")
INTEGERS = CPUINFO.exists() and "avx512_vnni" in CPUINFO.read_text() and not os.environ.get("LINEARPATCH_CPU_ISA")
built = pytest.mark.skipif(backends()["cpu"] is not True, reason=f"no compiled kernels: {backends()['cpu']}")
with_normalization = pytest.mark.parametrize("normalization", ["topk", "full", "tail"])


@cache
def instruction_sets() -> list[str]:
    """What this machine has, by asking the kernels for one that no machine has."""
    refusal = run_cases("none", 1).stderr
    return re.findall(r"\w+", refusal.rpartition("what this machine has: ")[2].splitlines()[0])


def run_cases(isa: str, count: int, seed: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.topk_kl_cases", str(seed), str(count)],
        cwd=ROOT,
        env={**os.environ, "LINEARPATCH_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@built
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize(
    "count", [60, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["few", "many"]
)
def test_random_calls_against_float64(isa: str, count: int) -> None:
    if isa not in instruction_sets():
        pytest.skip(f"this machine has no {isa}")
    checked = run_cases(isa, count, seed=count)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout == f"{count} cases, 0 wrong\n"


def operands(
    n: int, d: int, v: int, k: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) / d**0.5).to(dtype)
    return hidden, weight, torch.rand(n, k).softmax(1) * 0.9, torch.randint(-1, v, (n, k))


@built
@with_normalization
@pytest.mark.parametrize("n", [1, 40, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(normalization: str, n: int, dtype: torch.dtype) -> None:
    hidden, weight, probs, ids = operands(n, 96, 3000, 40, dtype)
    bias = torch.randn(3000)
    in_integers = INTEGERS and dtype == torch.bfloat16 and n >= 32
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        linear = OPS.linear_topk_kl_loss(hidden, weight, probs, ids, bias, normalization, 1.3, True, True, True)
        logits = hidden @ weight.T if threads == 1 else logits  # noqa: F821  # torch's own product may differ
        loss, normalizers = OPS.topk_kl_loss(logits, probs, ids, normalization, 1.3)
        gradient = OPS.topk_kl_loss_backward(loss, logits, probs, ids, normalizers, normalization, 1.3)
        results.append([*linear, loss, normalizers, gradient])
    torch.set_num_threads(before)
    for other in results[1:]:
        for i, (one, two) in enumerate(zip(results[0], other, strict=True)):
            if i == 1 and normalization != "topk" and not in_integers:  # torch's product splits this sum by the threads
                torch.testing.assert_close(one, two, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-8)
            else:
                assert one.equal(two)


def column(t: Tensor, factor: float) -> Tensor:
    return torch.cat((t[:, :1] * factor, t[:, 1:]), dim=1)


def row(t: Tensor, value: float) -> Tensor:
    """One number of one row changed."""
    return t.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value, dtype=t.dtype))


# What is done to the rows of the hidden states and of the weight, [130, 72] and [2100, 72]: two blocks of each.
ROWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "random": (lambda h: h, lambda w: w),
    "peaked": (lambda h: 12 * h, lambda w: w),
    "alike": (lambda h: h[:1].expand(130, 72) * torch.linspace(0.1, 9, 130)[:, None], lambda w: w + w[:1]),
    "all the same": (lambda h: h[:1].abs().expand(130, 72), lambda w: w[:1].abs().expand(2100, 72)),
    "constant": (lambda h: h * 0 + 0.37, lambda w: w * 0 + 0.011),
    "norms a thousand apart": (lambda h: h, lambda w: w * torch.logspace(-3, 0, 2100)[:, None]),
    "zeros": (lambda h: h * (torch.rand(130, 1) > 0.3), lambda w: w * (torch.rand(2100, 1) > 0.3)),
    "one large channel": (lambda h: column(h, 200), lambda w: w),
    "one large channel in one, small in the other": (lambda h: column(h, 200), lambda w: column(w, 1e-3)),
    "one large number": (lambda h: row(h, 3e3), lambda w: row(w, 40.0)),
    "tiny": (lambda h: h * 1e-19, lambda w: w),
    "huge": (lambda h: h * 1e-18, lambda w: w * 1e18),
    "beyond squares": (lambda h: h * 1e-22, lambda w: w * 1e22),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(COMPILER is None or not INTEGERS, reason="no C++ compiler, or no VNNI here")
def test_products_in_integers_under_sanitizers(tmp_path: Path) -> None:
    """tests/ops/native/integer_products.cpp: each result within what rounding its operands can have done to it."""
    sources = [NATIVE / "integer_products.cpp", ROOT / "csrc" / "topk_kl" / "cpu" / "avx512_vnni.cpp"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    program = tmp_path / "products"
    subprocess.run([COMPILER, "-std=c++20", "-O1", *sanitize, *sources, "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.fullmatch(r"\d+ cases, 0 wrong\n", ran.stdout)


@built
@pytest.mark.parametrize("normalization", ["full", "tail"])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_every_kind_in_half_precision(normalization: str, rows: str) -> None:
    """The products in integers (csrc/topk_kl/cpu/integer_table.h), and float32 where rows do not fit them."""
    hidden, weight, probs, ids = operands(130, 72, 2100, 9)
    change_hidden, change_weight = ROWS[rows]
    hidden, weight = change_hidden(hidden).bfloat16(), change_weight(weight).bfloat16()
    ids[7] = -1
    call = hidden, weight, probs, ids, None, normalization, 1.3, True, True, False
    exact = OPS.linear_topk_kl_loss_reference(*double(*call))
    assert not check(rows, OPS.linear_topk_kl_loss(*call), OPS.linear_topk_kl_loss_reference(*call), exact)


@built
@pytest.mark.skipif(not INTEGERS, reason="no VNNI here, or another instruction set is forced")
def test_rows_that_do_not_fit_integers_are_multiplied_in_float32() -> None:
    hidden, weight, probs, ids = operands(256, 72, 2100, 9, torch.bfloat16)
    options = probs, ids, None, "full", 1.0, True, False, False

    def in_float32(hidden: Tensor, weight: Tensor) -> list[bool]:
        """Of each block of 128 tokens, whether its gradient has the bits of products in float32."""
        given = OPS.linear_topk_kl_loss(hidden, weight, *options)[1]
        wide = OPS.linear_topk_kl_loss(hidden.float(), weight.float(), *options)[1].bfloat16()
        return [one.equal(other) for one, other in zip(given.split(128), wide.split(128), strict=True)]

    assert in_float32(hidden, weight) == [False, False]
    assert in_float32(column(hidden, 200), weight) == [True, True]
    assert in_float32(hidden, column(weight, 200)) == [True, True]
    hidden[129, 0] = 1e4
    assert in_float32(hidden, weight) == [False, True]


@built
@pytest.mark.parametrize("normalization", ["full", "tail"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_what_is_not_finite_in_half_precision_is_as_in_the_reference(
    normalization: str, value: float, place: str
) -> None:
    hidden, weight, probs, ids = operands(40, 32, 300, 9, torch.bfloat16)
    ids[ids == 3] = 4
    hidden, weight = (row(hidden, value), weight) if place == "hidden" else (hidden, row(weight, value))
    call = hidden, weight, probs, ids, None, normalization, 1.0, True, True, False
    ours, reference = OPS.linear_topk_kl_loss(*call), OPS.linear_topk_kl_loss_reference(*call)
    for one, other in zip(ours, reference, strict=True):
        assert one.isnan().equal(other.isnan())
        assert one.isinf().equal(other.isinf())


@built
@with_normalization
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_as_in_the_reference(normalization: str, value: float) -> None:
    _, _, probs, ids = operands(6, 4, 90, 7)
    for place in (int(ids[2].max()), next(i for i in range(90) if i not in ids[2])):
        logits = torch.randn(6, 90)
        logits[2, place] = value
        given = logits, probs, ids, normalization, 1.0
        (loss, kept), (other, other_kept) = OPS.topk_kl_loss(*given), OPS.topk_kl_loss_reference(*given)
        torch.testing.assert_close(loss, other, equal_nan=True)
        grads = [
            operator(torch.tensor(1.0), logits, probs, ids, normalizers, normalization, 1.0)
            for operator, normalizers in (
                (OPS.topk_kl_loss_backward, kept),
                (OPS.topk_kl_loss_backward_reference, other_kept),
            )
        ]
        torch.testing.assert_close(*grads, equal_nan=True, rtol=1e-5, atol=1e-7)


@built
@with_normalization
@pytest.mark.parametrize("place", ["slot", "elsewhere"])
def test_an_infinite_logit_spoils_the_gradients_as_in_the_reference(normalization: str, place: str) -> None:
    hidden, weight, probs, ids = operands(6, 8, 90, 7)
    bias = torch.zeros(90)
    bias[int(ids[2].max()) if place == "slot" else next(i for i in range(90) if i not in ids)] = float("inf")
    call = hidden, weight, probs, ids, bias, normalization, 1.0, True, True, True
    for one, other in zip(OPS.linear_topk_kl_loss(*call), OPS.linear_topk_kl_loss_reference(*call), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-6)


@built
@with_normalization
def test_a_nan_in_one_token_stays_there(normalization: str) -> None:
    hidden, weight, probs, ids = operands(5, 64, 300, 9)
    ids[4] = -1
    hidden[2, 3] = hidden[4] = float("nan")
    loss, dhidden, _, _ = OPS.linear_topk_kl_loss(
        hidden, weight, probs, ids, None, normalization, 1.0, *[True] * 2, False
    )
    assert loss.isnan()
    assert dhidden[2].isnan().all()
    assert dhidden[[0, 1, 3]].isfinite().all()
    assert dhidden[4].eq(0).all()


@built
def test_the_tail_is_exact_where_the_slots_hold_nearly_everything() -> None:
    """The rest of the student weighs 1e-7: as a difference of two sums its gradient would be noise."""
    hidden, weight, probs, _ = operands(4, 32, 400, 3)
    ids = torch.tensor([[5, 9, 17]]).expand(4, 3)
    bias = torch.zeros(400)
    bias[[5, 9, 17]] = 20.0
    arguments = (hidden, weight, probs, ids, bias, "tail", 1.0, True, True, True)
    exact = OPS.linear_topk_kl_loss_reference(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    )
    for one, true in zip(OPS.linear_topk_kl_loss(*arguments), exact, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=2e-5, atol=1e-6)


@built
@pytest.mark.parametrize("wrong", [90, 2**31 - 1, -2])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@with_normalization
def test_an_id_outside_the_vocabulary_is_refused(normalization: str, wrong: int, id_dtype: torch.dtype) -> None:
    hidden, weight, probs, ids = operands(6, 4, 90, 7)
    ids = ids.to(id_dtype)
    ids[3, 2] = wrong
    message = "teacher_ids has one outside the vocabulary of 90"
    with pytest.raises(RuntimeError, match=message):
        OPS.linear_topk_kl_loss(hidden, weight, probs, ids, None, normalization, 1.0, False, False, False)
    with pytest.raises(RuntimeError, match=message):
        OPS.topk_kl_loss(hidden @ weight.T, probs, ids, normalization, 1.0)
