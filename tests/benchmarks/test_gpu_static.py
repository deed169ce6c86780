"""The static model against worked numbers, the counter against programs written by hand, the kernels against limits."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from benchmarks import gpu_build, gpu_static
from benchmarks.gpu_sass import executed, program_graph, sass_programs
from benchmarks.gpu_static import (
    DEFAULT_DS,
    LOSSES,
    MACHINES,
    KernelRow,
    WarpCounts,
    cuda_row,
    cuda_selection,
    losses_row,
    losses_selection,
    modelled_cycles,
    read_rows,
    three_pass_cycles,
    triton_row,
    triton_selection,
    warp_counts,
)
from benchmarks.gpu_warp import Launched, Seen, Warp, bank_wavefronts

H100 = MACHINES["sm_90"]
LIMITS = read_rows(Path(gpu_static.__file__).with_name("gpu_limits.json"))
BFLOAT16_ROW = 2 * 4096 * 2


@pytest.mark.parametrize(
    ("counts", "cycles"),
    [
        # Butterflies in Triton, 24 LDS and 24 STS of 128 bits.
        (WarpCounts(instructions=562, fp=408, smem_wavefronts=48 * 4), (1133, 1124, 816, 1536)),
        # A kernel of shuffles.
        (WarpCounts(instructions=752, fp=408, shfl=160, smem_wavefronts=64), (1133, 1504, 816, 1792)),
    ],
    ids=["butterflies", "shuffles"],
)
def test_worked_numbers(counts: WarpCounts, cycles: tuple[int, ...]) -> None:
    modelled = modelled_cycles(H100, counts, row_bytes=BFLOAT16_ROW, warps=8)
    assert tuple(round(modelled[unit]) for unit in ("dram", "issue", "fp", "mio")) == cycles


def test_rows_share_a_block_and_a_peer_passes_three_times() -> None:
    counts = WarpCounts(instructions=1000, fp=0)
    one, two = (modelled_cycles(H100, counts, row_bytes=1, warps=8, rows=rows)["issue"] for rows in (1, 2))
    assert one == 2 * two == 2000
    # 8 warps of 128 shuffles and 16 accesses of 4 wavefronts, twice; and the product by the scale at memory speed.
    assert round(three_pass_cycles(H100, 4096, 2)) == 2 * 8 * (128 + 64) + 1133
    assert round(three_pass_cycles(H100, 4096, 4)) == 3 * 2 * 1133


PROGRAM = """
	.section	.text.kernel,"ax",@progbits
	.sectionflags	@"SHF_BARRIERS=1"
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/                   FADD R4, R4, R5 ;
.L_x_2:
        /*0040*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/               @P4 BRA `(.L_x_3) ;
        /*0080*/                   STS.128 [R7], R4 ;
.L_x_3:
        /*0090*/                   LDSM.16.M88.4 R4, [R7] ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/               @P3 CALL.REL.NOINC `(.L_x_4) ;
        /*00c0*/                   BRA `(.L_x_0) ;
.L_x_4:
        /*00d0*/                   FADD R4, R4, R5 ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
	.section	.nv.info,"",@"SHT_CUDA_INFO"
"""


def test_every_loop_is_counted_and_what_is_outside_of_the_rows_is_not() -> None:
    (program,) = sass_programs(PROGRAM).values()
    counts = executed(program_graph(program), trips=(5, 3))
    assert counts["LDG.E.128"] == counts["STG.E.64"] == counts["STS.128"] == 1
    assert counts["FADD"] == 5
    assert counts["SHFL.BFLY"] == 15
    assert "EXIT" not in counts
    assert warp_counts(counts) == WarpCounts(instructions=1 + 5 + 15 + 15 + 5 + 6, fp=5, shfl=15, smem_wavefronts=8)


def test_a_loop_of_unknown_length_is_an_error() -> None:
    (program,) = sass_programs(PROGRAM).values()
    with pytest.raises(ValueError, match="2 loops within the loop over rows, and the trip counts of 0 are known"):
        executed(program_graph(program))


def test_code_that_cannot_be_followed_is_an_error() -> None:
    (program,) = sass_programs(PROGRAM.replace("BRA `(.L_x_0)", "BRX R4 -0x10")).values()
    with pytest.raises(ValueError, match="cannot be followed"):
        program_graph(program)


# A parameter of 8 bytes at 0x210: a pointer's low half, and how often a loop turns. 24 threads branch off.
LOOPING = """
	.section	.nv.constant0.kernel,"a",@progbits
	.zero		536
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ULDC UR4, c[0x0][0x214] ;
        /*0020*/                   MOV R3, 0x100 ;
        /*0030*/                   LEA R2, R0, c[0x0][0x210], 0x4 ;
        /*0040*/                   MOV R5, RZ ;
.L_x_0:
        /*0050*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0060*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0070*/                   FADD R8, R8, R9 ;
        /*0080*/                   SHF.L.U32 R6, R0, 0x7, RZ ;
        /*0090*/                   STS [R6], R8 ;
        /*00a0*/                   ISETP.GE.AND P0, PT, R5, UR4, PT ;
        /*00b0*/              @!P0 BRA `(.L_x_0) ;
        /*00c0*/                   BSSY B0, `(.L_x_2) ;
        /*00d0*/                   ISETP.GE.U32.AND P1, PT, R0, 0x8, PT ;
        /*00e0*/               @P1 BRA `(.L_x_1) ;
        /*00f0*/                   FMUL R9, R8, R8 ;
        /*0100*/                   STG.E.128 desc[UR6][R2.64], R8 ;
.L_x_1:
        /*0110*/                   BSYNC B0 ;
.L_x_2:
        /*0120*/               @P1 FMUL R9, R8, R8 ;
        /*0130*/                   ISETP.LT.AND P2, PT, R5, RZ, PT ;
        /*0140*/               @P2 STG.E.128 desc[UR6][R2.64], R8 ;
        /*0150*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0160*/                   EXIT ;
"""


def ran(text: str, turns: int, *, threads: int = 32) -> Seen:
    (program,) = sass_programs(text).values()
    parameters = (0x1000).to_bytes(4, "little") + turns.to_bytes(4, "little")
    tensors = {"x": ((0x100 << 32) + 0x1000, 512)}
    return Warp(program, Launched(parameters, (1, 1), threads, tensors, 4096), 0).run()


def test_a_loop_counts_as_often_as_it_turns() -> None:
    more = ran(LOOPING, 7) - ran(LOOPING, 2)
    assert more.counts == dict.fromkeys(("LDG.E.128", "IADD3", "FADD", "SHF.L.U32", "STS", "ISETP.GE.AND", "BRA"), 5)
    assert more.moved == {"x": 5 * 512}
    assert more.wavefronts == 5 * 32  # 128 bytes from lane to lane: all in one bank


def test_who_branches_off_comes_back_and_who_is_off_moves_nothing() -> None:
    seen = ran(LOOPING, 1)
    assert seen.moved == {"x": 512, "to x": 8 * 16}
    assert seen.counts["FMUL"] == 2
    assert seen.counts["off STG.E.128"] == seen.counts["STG.E.128"] == 1
    assert seen.counts["BAR.SYNC.DEFER_BLOCKING"] == 1


# Rows come to shared memory on their own, and a product leaves four sums.
COPYING = """
	.section	.nv.constant0.kernel,"a",@progbits
	.zero		536
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R3, 0x100 ;
        /*0020*/                   LEA R2, R0, c[0x0][0x210], 0x4 ;
        /*0030*/                   SHF.L.U32 R6, R0, 0x4, RZ ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R6+0x200], desc[UR6][R2.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   DEPBAR.LE SB0, 0x0 ;
        /*0070*/                   LDS.128 R8, [R6+0x200] ;
        /*0080*/                   MOV R13, 0x7 ;
        /*0090*/                   HMMA.16816.F32.BF16 R12, R8, R4, RZ ;
        /*00a0*/                   STG.E.128 desc[UR6][R2.64], R12 ;
        /*00b0*/                   EXIT ;
"""


def test_a_copy_to_shared_memory_is_a_load_and_a_store() -> None:
    seen = ran(COPYING, 1)
    assert seen.moved == {"x": 512, "to x": 512}
    assert seen.wavefronts == 4 + 4
    assert seen.counts["LDGSTS.E.BYPASS.128"] == seen.counts["HMMA.16816.F32.BF16"] == 1


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("[R6+0x200], desc", "[R6+0x1400], desc", "not a place in shared memory"),
        ("[R2.64] ;\n        /*0050", "[R6.64] ;\n        /*0050", "not a place in a tensor"),
        ("MOV R13, 0x7 ;", "MOV R13, 0x0 ;", "an address is not known"),
    ],
    ids=["shared", "tensor", "sums"],
)
def test_a_copy_or_a_product_gone_wrong_is_an_error(before: str, after: str, said: str) -> None:
    text = COPYING.replace("STG.E.128 desc[UR6][R2.64]", "STS [R13]") if said.startswith("an address") else COPYING
    assert text.count(before) == 1
    with pytest.raises(ValueError, match=said):
        ran(text.replace(before, after), 1)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("R0, c[0x0][0x210], 0x4", "R0, c[0x0][0x210], 0x5", "not a place in a tensor"),
        ("c[0x0][0x210], 0x4 ;", "0x1004, 0x4 ;", "not a place in a tensor"),
        ("R6, R0, 0x7", "R6, R0, 0x8", "not a place in shared memory"),
        ("P0, PT, R5, UR4", "P0, PT, R8, UR4", "where this goes depends on data"),
        ("SHF.L.U32 R6", "FROB R6", "this operation is not known"),
        ("SHF.L.U32 R6", "VIMNMX.64 R6", "this operation on 64 bits is not known"),
        ("MOV R3, 0x100", "MOV R3, SR_CLOCK", "SR_CLOCK"),
    ],
    ids=["beyond", "askew", "shared", "data", "operation", "long", "special"],
)
def test_what_cannot_be_right_is_an_error(before: str, after: str, said: str) -> None:
    assert LOOPING.count(before) == 1
    with pytest.raises(ValueError, match=said):
        ran(LOOPING.replace(before, after), 3)


# The threads' numbers over the parameter, by a function of the compiler; who has less than 2 takes one of two pairs.
DIVIDING = """
	.section	.nv.constant0.kernel,"a",@progbits
	.zero		536
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R11, 0x60 ;
        /*0020*/                   LEA R4, R0, 0xf000, 0x5 ;
        /*0030*/                   LDC R5, c[0x0][0x214] ;
        /*0040*/                   LOP3.LUT R4, R4, 0xffff, RZ, 0xc0, !PT ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u16) ;
        /*0060*/                   ISETP.GE.U32.AND P2, PT, R0, 0x2, PT ;
        /*0070*/                   CS2R R2, SRZ ;
        /*0080*/                   MOV R12, 0x5 ;
        /*0090*/                   MOV R13, 0x7 ;
        /*00a0*/                   SEL.64 R14, R12, R2, !P2 ;
        /*00b0*/                   EXIT ;
        .size           $__internal_0_$__cuda_sm20_div_u16,(.L_x_1 - $__internal_0_$__cuda_sm20_div_u16)
$__internal_0_$__cuda_sm20_div_u16:
        /*00c0*/                   I2F.U16 R8, R5 ;
        /*00d0*/                   HFMA2 R9, -RZ, RZ, 15, 0 ;
        /*00e0*/                   I2FP.F32.U32.RZ R4, R4 ;
        /*00f0*/                   FSETP.GEU.AND P1, PT, |R8|.reuse, 1.175494350822287508e-38, PT ;
        /*0100*/                   FSETP.GT.AND P0, PT, |R8|, 8.50705917302346158658e+37, PT ;
        /*0110*/                   FSEL R9, R9, 1, !P1 ;
        /*0120*/                   FSEL R9, R9, 0.25, !P0 ;
        /*0130*/                   ISETP.NE.U32.AND P0, PT, R5, RZ, PT ;
        /*0140*/                   HFMA2 R5, -RZ, RZ, 0, 0 ;
        /*0150*/                   FMUL R8, R8, R9 ;
        /*0160*/                   MUFU.RCP R8, R8 ;
        /*0170*/                   FMUL R9, R9, R8 ;
        /*0180*/                   IADD3 R9, PT, PT, R9, 0x2, RZ ;
        /*0190*/                   FMUL.RZ R9, R4, R9 ;
        /*01a0*/                   MOV R4, R11 ;
        /*01b0*/                   F2I.U32.TRUNC.NTZ R9, R9 ;
        /*01c0*/                   LOP3.LUT R10, R9, 0xffff, RZ, 0xc0, !PT ;
        /*01d0*/              @!P0 MOV R10, 0xffffffff ;
        /*01e0*/                   RET.REL.NODEC R4 `(kernel) ;
.L_x_1:
"""


def divided(text: str, by: int) -> Warp:
    (program,) = sass_programs(text).values()
    warp = Warp(program, Launched(bytes(4) + by.to_bytes(4, "little"), (1, 1), 32, {}, 0), 0)
    warp.run()
    return warp


@pytest.mark.parametrize("by", [1, 3, 7, 512, 1000, 65535])
def test_a_function_is_called_and_returned_from(by: int) -> None:
    warp = divided(DIVIDING, by)
    quotients = [(0xF000 + 32 * lane) // by for lane in range(32)]
    assert warp.registers["R", 10].tolist() == quotients
    assert sum(warp.seen.counts.values()) == 12 + 19
    assert warp.seen.counts["RET.REL.NODEC"] == 1


def test_pairs_are_chosen_whole() -> None:
    registers = divided(DIVIDING, 1).registers
    assert registers["R", 14].tolist() == [5] * 2 + [0] * 30
    assert registers["R", 15].tolist() == [7] * 2 + [0] * 30


def test_a_call_for_rare_floats_is_not_taken() -> None:
    with pytest.raises(ValueError, match="a call for rare floats"):
        divided(DIVIDING.replace("div_u16", "rcp_rn_f32_slowpath"), 1)


def test_banks() -> None:
    import numpy as np

    lanes, everyone = np.arange(32, dtype=np.uint64), np.ones(32, bool)
    for stride, size, passes in ((4, 4, 1), (0, 4, 1), (8, 4, 2), (128, 4, 32), (132, 4, 1), (16, 16, 4), (64, 16, 16)):
        assert bank_wavefronts(lanes * np.uint64(stride), everyone, size) == passes, stride
    assert bank_wavefronts(lanes * np.uint64(128), lanes < 5, 4) == 5


def check_limit(row: KernelRow, limit: KernelRow) -> None:
    assert row.spills == 0
    for count in ("registers", "shared_bytes", "ldg", "stg", "shfl", "smem_wavefronts", "bar", "instructions"):
        assert getattr(row, count) <= getattr(limit, count), (row.key, count)
    assert row.ldg - row.ldg128 <= limit.ldg - limit.ldg128  # what is not wide: H_m, and on AMD rows of d = 576
    assert row.stg - row.stg128 <= limit.stg - limit.stg128
    assert row.source == "triton" or row.stg == row.stg128
    assert limit.dram_fraction is None or (row.dram_fraction or 0) >= limit.dram_fraction


def test_limits() -> None:
    """Those of one kernel; all of them are a job of minutes."""
    (limit,) = [row for row in LIMITS if row.key == ("hadamard_patch_forward", "triton", "sm_90", "bfloat16", 2048)]
    check_limit(triton_row("hadamard_patch_forward", "sm_90", "bfloat16", 2048), limit)


NVCC = pytest.mark.skipif(gpu_build.nvcc() is None, reason="no nvcc")


@pytest.mark.slow
@NVCC
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", sorted({row.arch for row in LIMITS if row.source == "cuda"}))
def test_all_limits_of_cuda(arch: str) -> None:
    limits = [row for row in LIMITS if row.source == "cuda" and row.arch == arch]
    selected = [(kernel, "cuda", *others) for kernel, *others in cuda_selection([arch], DEFAULT_DS)]
    assert {row.key for row in limits} <= {*selected}
    for limit in limits:
        check_limit(cuda_row(limit.kernel, limit.arch, limit.dtype, limit.d), limit)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted({row.arch for row in LIMITS}))
def test_all_limits(arch: str) -> None:
    limits = [row for row in LIMITS if row.source == "triton" and row.arch == arch]
    selected = [*triton_selection([arch], DEFAULT_DS), *losses_selection([arch], DEFAULT_DS)]
    assert [row.key for row in limits] == [(kernel, "triton", *others) for kernel, *others in selected]
    for limit in limits:
        row_of = losses_row if limit.kernel in LOSSES else triton_row
        check_limit(row_of(limit.kernel, limit.arch, limit.dtype, limit.d), limit)


def test_limits_keep_the_promises() -> None:
    rows = {row.key: row for row in LIMITS}
    assert {row.status for row in LIMITS} == {gpu_static.STATUS}
    assert all(row.spills == 0 for row in LIMITS)
    wide = [row for row in LIMITS if row.arch.startswith("sm_") and row.kernel not in LOSSES]  # they store one logit
    assert all(row.stg == row.stg128 for row in wide)
    for source, d in product(("cuda", "triton"), (2048, 4096, 8192)):
        row = rows["hadamard_patch_forward", source, "sm_90", "bfloat16", d]
        assert row.ldg == row.ldg128
        assert row.dram_fraction is not None
        assert row.dram_fraction >= 0.90
        assert row.three_pass_fraction is not None
        assert row.three_pass_fraction <= 0.4


def test_command_writes_the_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "sm_90", "--d", "2048", "--source", "triton", "--json", str(tmp_path / "rows.json")]
    assert gpu_static.main(arguments) == 0
    assert gpu_static.STATUS in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    asked = "kernel source arch dtype d registers spills shared_bytes ldg ldg128 stg stg128 shfl smem_wavefronts bar"
    assert {*asked.split(), "instructions", "dram_fraction"} <= set(row)
    assert (row["ldg"], row["stg"]) == (4, 4)
