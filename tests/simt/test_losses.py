"""The losses' CUDA kernels, run on the CPU by the emulator: against float64, in several orders of threads."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearpatch_kernels.ops.topk_kl import cuda, gpu
from tests.simt.emulator import COMPILER, HERE, SCHEDULES, mutated_sources
from tests.simt.topk_kl_emulator import Emulator, build
from tests.support.topk_kl_cases import DTYPES, OPS, check, double, teacher, wrong_in_extremes
from tools.gpu_model.build import nvcc, tool
from tools.gpu_model.losses import count_cuda, loads_together, longest_loop
from tools.gpu_model.sass import sass_programs

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
NORMALIZATIONS = ["topk", "full", "tail"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(build(tmp_path_factory.mktemp("topk_kl")))


@pytest.fixture
def emulator(compiled: Emulator) -> Emulator:
    compiled.configure()
    return compiled


def held_to_float64(emulator: Emulator, normalization: str, dtype: torch.dtype, chance: random.Random) -> list[str]:
    """A random call; what is wrong, one line each."""
    n, k = chance.choice([1, 2, 5]), chance.choice([1, 2, 7, 33])
    d = chance.choice([8, 16, 72, 256, 264, 2056])
    v = chance.choice([1, 17, 90]) if d > 300 else chance.choice([1, 17, 333, 4100])
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) / d**0.5).to(chance.choice([dtype, *DTYPES]))
    if chance.random() < 0.3:
        hidden = torch.randn(n, d + 4).to(dtype)[:, :d]
    bias = torch.randn(v) if chance.random() < 0.5 else None
    probs, ids = teacher(n, k, v, normalization, chance)
    ids = ids.to(chance.choice([torch.int32, torch.int64]))
    flags = [chance.random() < 0.7, chance.random() < 0.7, bias is not None and chance.random() < 0.7]
    arguments = (hidden, weight, probs, ids, bias, normalization, chance.choice([1.0, 0.7]), *flags)
    wrong = check(
        f"{normalization} N {n} d {d} V {v} K {k} {dtype} {weight.dtype} {flags}",
        gpu.linear_topk_kl_loss(*arguments, kernels=emulator.kernels),
        OPS.linear_topk_kl_loss_reference(*arguments),
        OPS.linear_topk_kl_loss_reference(*double(*arguments)),
    )
    return wrong + emulator.faults()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("count", [4, pytest.param(12, marks=pytest.mark.slow)], ids=["few", "many"])
def test_against_float64(emulator: Emulator, normalization: str, schedule: str, count: int) -> None:
    chance = random.Random(f"{normalization} {schedule} {count}")
    for i in range(count):
        emulator.configure(schedule, seed=i)
        assert not held_to_float64(emulator, normalization, chance.choice(DTYPES), chance)
        assert emulator.launches() >= 2


def test_logits_far_from_zero_and_nothing_beside_the_slots(emulator: Emulator) -> None:
    assert not wrong_in_extremes(lambda *call: gpu.linear_topk_kl_loss(*call, kernels=emulator.kernels))
    assert not emulator.faults()


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(5, 32), torch.randn(60, 32), torch.rand(5, 6).softmax(1) * 0.9, torch.randint(0, 60, (5, 6))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_same_bits_in_every_order(emulator: Emulator, normalization: str) -> None:
    results = []
    given = operands()
    for schedule in SCHEDULES:
        emulator.configure(schedule, seed=3)
        results.append(
            gpu.linear_topk_kl_loss(*given, torch.ones(60), normalization, 1.0, True, True, True, emulator.kernels)
        )
    assert all(one.equal(two) for other in results[1:] for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_what_does_not_count_is_not_read(
    emulator: Emulator, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ignored token, an absent slot, an id outside of the vocabulary, a NaN in one token."""
    hidden, weight, probs, ids = operands()
    ids[3], ids[1, 2] = -1, -1

    def run(hidden: Tensor, probs: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return gpu.linear_topk_kl_loss(
            hidden, weight, probs, ids, None, normalization, 1.0, True, True, False, emulator.kernels
        )

    clean = run(hidden, probs, ids)
    spoiled = hidden.clone()
    spoiled[3] = torch.nan
    for one, two in zip(run(spoiled, probs.masked_fill(ids < 0, torch.nan), ids), clean, strict=True):
        assert one.equal(two)
    spoiled[2, 7] = torch.nan
    loss, dhidden, _, _ = run(spoiled, probs, ids)
    assert loss.isnan()
    assert dhidden[2].isnan().all()
    assert dhidden[[0, 1, 3, 4]].equal(clean[1][[0, 1, 3, 4]])
    monkeypatch.setattr(gpu, "check_ids", lambda *_: None)  # as on a GPU
    ids[4, 0] = 60
    loss, dhidden, _, _ = run(hidden, probs, ids)
    assert loss.isnan()
    assert dhidden[[0, 1, 2, 3]].equal(clean[1][[0, 1, 2, 3]])
    assert not emulator.faults()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_lazy_clone_that_is_only_read_is_not_copied(emulator: Emulator, normalization: str) -> None:
    given = [torch._lazy_clone(tensor) for tensor in (*operands(), torch.randn(60))]
    results = gpu.linear_topk_kl_loss(*given, normalization, 1.0, True, True, True, emulator.kernels)
    assert all(torch._C._is_cow_tensor(tensor) for tensor in given)
    again = gpu.linear_topk_kl_loss(*given, normalization, 1.0, True, True, True, emulator.kernels)
    assert all(one.equal(two) for one, two in zip(results, again, strict=True))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_what_memory_held_before_counts_nothing(
    emulator: Emulator, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several parts of the vocabulary, and over none that has a logit."""
    monkeypatch.setattr(gpu, "_IDS_AT_ONCE", 2048)
    given = torch.randn(3, 16), torch.randn(4200, 16), torch.rand(3, 4) / 4, torch.randint(2048, 4200, (3, 4))
    bias = torch.zeros(4200)
    bias[:2048] = -torch.inf
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        results = gpu.linear_topk_kl_loss(*given, bias, normalization, 1.0, True, True, True, emulator.kernels)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = OPS.linear_topk_kl_loss_reference(*double(*given, bias), normalization, 1.0, True, True, True)
    single = OPS.linear_topk_kl_loss_reference(*given, bias, normalization, 1.0, True, True, True)
    assert not check("", results, single, exact)
    assert not emulator.faults()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_name_nothing_are_told_from_absent_slots(
    emulator: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "check_ids", lambda *_: None)  # as on a GPU
    wrong = [-2, 60, -(2**31), 2**31 - 1]
    if dtype == torch.int64:
        wrong += [2**32 + 5, 2**32 - 1, -(2**32), 2**31, 2**63 - 1, -(2**63), -(2**32) + 5]
    hidden, weight, probs, ids = operands()
    for id_ in (*wrong, -1, 5):
        ids[2, 3] = id_
        loss, _, _, _ = gpu.linear_topk_kl_loss(
            hidden, weight, probs, ids.to(dtype), None, "topk", 1.0, True, False, False, emulator.kernels
        )
        assert loss.isnan() == (id_ in wrong), id_
    assert not emulator.faults()


@pytest.mark.parametrize("tokens", [1, 31, 1025, 2100])
def test_how_many_tokens_count(emulator: Emulator, tokens: int) -> None:
    ids = torch.randint(-1, 2, (tokens, 2))
    narrow, count, scale = gpu._counted(emulator.kernels, ids, 0.7)
    expected = max(1, int((ids >= 0).any(1).sum()))
    assert narrow.equal(ids.int())
    assert count.item() == expected
    assert scale.item() == pytest.approx(1 / (0.7 * expected), rel=1e-6)
    assert not emulator.faults()


def test_a_gradient_in_bfloat16_is_float32s_rounded(emulator: Emulator) -> None:
    hidden, weight, probs, ids = operands()
    hidden = hidden.bfloat16()
    flags = (True, False, False)
    _, narrow, _, _ = gpu.linear_topk_kl_loss(hidden, weight, probs, ids, None, "topk", 1.0, *flags, emulator.kernels)
    _, wide, _, _ = gpu.linear_topk_kl_loss(
        hidden.float(), weight, probs, ids, None, "topk", 1.0, *flags, emulator.kernels
    )
    assert narrow.dtype == torch.bfloat16
    assert narrow.equal(wide.bfloat16())


def test_few_kernels_are_launched(emulator: Emulator) -> None:
    """Of ours, five for "topk", and none of torch's in between: on a GPU each costs the host more than its work."""
    given = operands()
    with _Calls(run=True) as seen:
        gpu.linear_topk_kl_loss(*given, None, "topk", 1.0, True, False, False, emulator.kernels)
    assert emulator.launches() == 5
    others = {str(function) for function, _ in seen.calls if function.namespace != "linearpatch_simt"}
    # Neither memory nor a view of it is a kernel; the least and the largest id are asked for on a CPU alone.
    memory = {"empty.memory_format", "empty_like.default", "new_empty.default", "split.Tensor"}
    checks = {"min.default", "max.default", "_local_scalar_dense.default"}
    assert others <= {f"aten.{name}" for name in memory | checks}


class _Calls(TorchDispatchMode):
    """Which operators are called, with what they were given; unless they are run, the result is ``out``."""

    def __init__(self, *, run: bool = False) -> None:
        super().__init__()
        self.run = run
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.calls.append((function, keywords or {}))
        return function(*arguments, **(keywords or {})) if self.run else keywords["out"]


@pytest.mark.parametrize("add", [False, True])
def test_a_product_of_halves_is_added_up_in_one_call(add: bool) -> None:
    a, b, out = (torch.empty(*shape, dtype=dtype, device="meta") for shape, dtype in (
        ((3, 4), torch.bfloat16), ((4, 5), torch.bfloat16), ((3, 5), torch.float32)))  # fmt: skip
    with _Calls() as seen:
        gpu._product(a, b, out, add=add)
    ((function, keywords),) = seen.calls
    assert function is (torch.ops.aten.addmm.dtype_out if add else torch.ops.aten.mm.dtype_out)
    assert keywords["out"] is out


@pytest.mark.parametrize("width", [1, 12, 8200])
def test_other_widths_are_not_served(width: int) -> None:
    assert not cuda.COMPILED.serves(width)


# What is changed in the kernels, and what is said of it. Each is a slip that somebody could make.
MUTATIONS = {
    "no barrier between a token's dots": ("__syncthreads();  // the other", "// the other", "race: shared word"),
    "an id of its own for every slot": (
        "if (k == begin || read_int(ids + k - 1) != id) write(row",
        "write(row",
        "race: logits",
    ),
    "no check of an id": (
        "inside(row) && vector(v) < count",
        "row >= 0 && vector(v) < count",
        "out of bounds",
    ),
    "slots overwritten before they are read": (
        "slots + k, z);\n  }\n  __syncthreads();",
        "slots + k, z);\n  }",
        "race: logits",
    ),
    "a gradient left out": (
        "if (vector(v) >= count) continue;",
        "if (vector(v) >= count - 1) continue;",
        "never written",
    ),
}


def applied(mutation: str, folder: Path) -> Path:
    """A copy of the sources with one mutation, whose emulator is to be built."""
    before, after, _ = MUTATIONS[mutation]
    return mutated_sources(folder, "topk_kl", "losses.cuh", before, after)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_apply(mutation: str, tmp_path: Path) -> None:
    applied(mutation, tmp_path)


RUN = """
import sys
from pathlib import Path
import torch
import linearpatch_kernels.ops.topk_kl
from linearpatch_kernels.ops.topk_kl import gpu
from tests.simt.topk_kl_emulator import Emulator
gpu.check_ids = lambda *_: None
emulator = Emulator(Path(sys.argv[1]))
said = []
ids = torch.tensor([[3, 9, 9, 60, 1], [9, 9, 4, 0, 59]])
for normalization in ("topk", "tail"):
    for schedule in ("forward", "reverse"):
        emulator.configure(schedule)
        given = torch.randn(2, 576), torch.randn(60, 576), torch.rand(2, 5), ids, None
        gpu.linear_topk_kl_loss(*given, normalization, 1.0, True, True, False, emulator.kernels)
        said += emulator.faults()
print(*said, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_mutation_of_the_kernels_is_seen(mutation: str | None, tmp_path: Path) -> None:
    library = build(tmp_path, here=applied(mutation, tmp_path) if mutation else HERE, optimize="-O0")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, library],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert (MUTATIONS[mutation][2] in ran.stdout) if mutation else not ran.stdout.strip()


# --- compiled --------------------------------------------------------------------------------------------------------


KERNELS = 14
# The most registers a thread on sm_90a, and the loads of 16 bytes that travel together on every architecture.
REGISTERS = {
    "slot_rows<BFloat16, 1, 4>": 80, "slot_rows<Half, 1, 4>": 80, "slot_rows<float, 1, 4>": 80,
    "slot_rows<BFloat16, 2, 2>": 104, "slot_rows<Half, 2, 2>": 104, "slot_rows<float, 2, 2>": 120,
    "combine_rows<BFloat16>": 56, "combine_rows<Half>": 56, "combine_rows<float>": 64, "carry_part": 56,
}  # fmt: skip
TOGETHER = {name: 8 if "float" in name or name == "carry_part" else 4 for name in REGISTERS}


def test_loads_that_travel_together_are_counted() -> None:
    program = """
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   LDG.E R16, desc[UR4][R2.64] ;
        /*0030*/                   FADD R20, R7, R16 ;
        /*0040*/                   LDG.E.128 R12, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.128 R24, desc[UR4][R14.64] ;
.L_x_0:
        /*0060*/                   LDG.E.128 R28, desc[UR4][R2.64] ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/                   EXIT ;
.L_x_1:
        /*00a0*/                   BRA `(.L_x_1);
"""
    (kernel,) = sass_programs(program).values()
    assert loads_together(kernel) == 3  # R8, R24, R28: R4 and R12 were asked for
    assert longest_loop(kernel) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(nvcc() is None or tool("nvdisasm") is None, reason="no nvcc, or no nvdisasm")
@pytest.mark.parametrize("architecture", ["75", "80", "86", "89", "90a", "100", "120"])
def test_compiles_without_spills_and_with_loads_that_travel_together(architecture: str, tmp_path: Path) -> None:
    counted = {kernel.name: kernel for kernel in count_cuda(architecture, tmp_path)}
    assert len(counted) == KERNELS
    assert not any(kernel.spills for kernel in counted.values())
    opcodes = [opcode for kernel in counted.values() for opcode in kernel.opcodes]
    assert not any(opcode.startswith(("ATOM", "RED.", "REDG")) for opcode in opcodes)
    assert {name: counted[name].loads_together for name in TOGETHER} == TOGETHER
    if architecture == "90a":
        assert all(counted[name].registers <= most for name, most in REGISTERS.items())
