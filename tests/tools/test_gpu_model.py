"""The static model against worked numbers, the counter against programs written by hand, the kernels against limits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import triton

from tools.gpu_model import against, block, build, machines, model
from tools.gpu_model.__main__ import main
from tools.gpu_model.block import cycles_together
from tools.gpu_model.machines import MACHINES, machine_of
from tools.gpu_model.model import (
    CHECKED,
    DEFAULT_DS,
    LOSSES,
    KernelRow,
    WarpCounts,
    cuda_row,
    cuda_selection,
    losses_row,
    losses_selection,
    modelled_cycles,
    nvidia_row,
    read_rows,
    three_pass_cycles,
    triton_row,
    triton_selection,
    warp_counts,
)
from tools.gpu_model.sass import Instruction, executed, program_graph, sass_programs
from tools.gpu_model.warp import Launched, Seen, Step, Warp, bank_wavefronts

H100 = MACHINES["sm_90"]
LIMITS = read_rows(Path(model.__file__).with_name("limits.json"))
MEASURED = machines.RESULTS / "gpu-nvidia-h100-80gb-hbm3.json"
BFLOAT16_ROW = 2 * 4096 * 2


@pytest.mark.parametrize(
    ("counts", "cycles"),
    [
        # Butterflies in Triton, 24 LDS and 24 STS of 128 bits.
        (WarpCounts(instructions=562, fp=408, smem_wavefronts=48 * 4), (1133, 1124, 816, 1536)),
        # A kernel of shuffles.
        (WarpCounts(instructions=752, fp=408, shfl=160, smem_wavefronts=64), (1133, 1504, 816, 1792)),
        # The same, and a row from memory and back: 2 x 2 accesses of 16 bytes.
        (WarpCounts(752, 408, shfl=160, smem_wavefronts=64, global_wavefronts=16), (1133, 1504, 816, 1920)),
    ],
    ids=["butterflies", "shuffles", "with its row"],
)
def test_worked_numbers(counts: WarpCounts, cycles: tuple[int, ...]) -> None:
    modelled = modelled_cycles(H100, counts, row_bytes=BFLOAT16_ROW, warps=8)
    assert tuple(round(modelled[unit]) for unit in ("dram", "issue", "fp", "lsu")) == cycles


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
    assert warp_counts(counts) == WarpCounts(
        instructions=1 + 5 + 15 + 15 + 5 + 6, fp=5, shfl=15, smem_wavefronts=8, global_wavefronts=6
    )


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


def warp_of(text: str, turns: int = 1, *, threads: int = 32) -> Warp:
    (program,) = sass_programs(text).values()
    parameters = (0x1000).to_bytes(4, "little") + turns.to_bytes(4, "little")
    tensors = {"x": ((0x100 << 32) + 0x1000, 512)}
    warp = Warp(program, Launched(parameters, (1, 1), threads, tensors, 4096), 0)
    warp.run()
    return warp


def ran(text: str, turns: int) -> Seen:
    return warp_of(text, turns).seen


def test_a_loop_counts_as_often_as_it_turns() -> None:
    more = ran(LOOPING, 7) - ran(LOOPING, 2)
    assert more.counts == dict.fromkeys(("LDG.E.128", "IADD3", "FADD", "SHF.L.U32", "STS", "ISETP.GE.AND", "BRA"), 5)
    assert more.moved == {"x": 5 * 512}
    assert more.wavefronts == 5 * 32  # 128 bytes from lane to lane: all in one bank
    assert more.lines == 5 * 4


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


# What a thread has no register for goes to its local memory and comes back, and is an address then.
SPILLING = """
	.section	.nv.constant0.kernel,"a",@progbits
	.zero		536
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R1, R1, -0x10, RZ ;
        /*0020*/                   S2R R0, SR_TID.X ;
        /*0030*/                   MOV R3, 0x100 ;
        /*0040*/                   LEA R2, R0, c[0x0][0x210], 0x4 ;
        /*0050*/                   STL.64 [R1+0x8], R2 ;
        /*0060*/                   CS2R R2, SRZ ;
        /*0070*/                   LDL.64 R6, [R1+0x8] ;
        /*0080*/                   STG.E.128 desc[UR6][R6.64], R8 ;
        /*0090*/                   EXIT ;
"""


def test_what_was_spilled_comes_back() -> None:
    seen = ran(SPILLING, 1)
    assert seen.moved == {"to x": 512}
    assert seen.lines == 2 + 2 + 4
    with pytest.raises(ValueError, match=r"LDL\.64 R6"):  # nothing lies there
        ran(SPILLING.replace("R6, [R1+0x8]", "R6, [R1]"), 1)


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


@pytest.mark.parametrize(
    ("opcode", "operands", "written", "read"),
    [
        ("FFMA", "R1, R2, R3.reuse, -R4", "R1", "R2 R3 R4"),
        ("IADD3", "R1, P0, P1, R2, R3, RZ", "R1 P0 P1", "R2 R3"),
        ("IADD3.X", "R1, R2, R3, RZ, P0, !PT", "R1", "R2 R3 P0"),
        ("ISETP.GE.AND", "P0, PT, R5, UR4, P1", "P0", "R5 UR4 P1"),
        ("LOP3.LUT", "P0, RZ, R1, R2, RZ, 0xc0, !PT", "P0", "R1 R2"),
        ("SHFL.BFLY", "PT, R5, R4, 0x1, 0x1f", "R5", "R4"),
        ("FCHK", "P0, R1, R2", "P0", "R1 R2"),
        ("IMAD.WIDE", "R2, R4, 0x4, R6", "R2 R3", "R4 R6 R7"),
        ("HMMA.1688.F32.TF32", "R4, R8, R12, RZ", "R4 R5 R6 R7", "R8 R9 R10 R11 R12 R13"),
        ("LDG.E.128", "R4, desc[UR6][R2.64]", "R4 R5 R6 R7", "UR6 R2 R3"),
        ("STS.64", "[R6+0x10], R8", "", "R6 R8 R9"),
        ("LDGSTS.E.BYPASS.128", "[R6+0x200], desc[UR8][R2.64]", "", "R6 UR8 R2 R3"),
        ("BAR.SYNC.DEFER_BLOCKING", "R9, 0x40", "", "R9"),
        ("BRA", "`(.L_x_0)", "", ""),
    ],
)
def test_what_an_instruction_writes_and_reads(opcode: str, operands: str, written: str, read: str) -> None:
    instruction = Instruction(opcode, operands, "@!P3")
    assert [f"{file}{number}" for file, number in instruction.written] == written.split()
    assert [f"{file}{number}" for file, number in instruction.read] == [*read.split(), "P3"]


def steps_of(body: str, threads: int = 32) -> list[Step]:
    """Of a program whose R2 is a place in a tensor, and R6 one in shared memory."""
    lines = "\n".join(f"        /*0050*/                   {line} ;" for line in body.split("; ") if line)
    whole = f"""
	.section	.nv.constant0.kernel,"a",@progbits
	.zero		536
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R3, 0x100 ;
        /*0020*/                   LEA R2, R0, c[0x0][0x210], 0x4 ;
        /*0030*/                   SHF.L.U32 R6, R0, 0x4, RZ ;
        /*0040*/                   IADD3 R7, R2, R6, RZ ;
{lines}
        /*0ff0*/                   EXIT ;
"""
    return warp_of(whole, threads=threads).steps


def timed(body: str, *, warps: int = 1, blocks: int = 1) -> float:
    """The cycles that it adds to a program which does nothing."""
    whole, nothing = (cycles_together([steps_of(text)] * warps, blocks, H100) for text in (body, ""))
    return whole - nothing


def test_an_instruction_waits_for_what_it_reads() -> None:
    assert timed("FADD R8, R8, R9; FADD R8, R8, R9; FADD R8, R8, R9") == 1 + 2 * block.ARITHMETIC
    assert timed("FADD R8, R9, R9; FADD R10, R9, R9; FADD R11, R9, R9") == 3
    # A product keeps a scheduler's unit for eight cycles: 2048 multiply-adds of 256.
    independent = "HMMA.16816.F32.BF16 R12, R20, R24, RZ; HMMA.16816.F32.BF16 R16, R20, R24, RZ"
    assert timed(independent) == 8 + 1
    assert timed(independent.replace("R24, RZ; ", "R24, RZ; FADD R12, R12, R12; ")) == block.PRODUCT + 2


def test_memory_shared_memory_and_the_pipe_that_both_need() -> None:
    load = "LDG.E.128 R8, desc[UR6][R2.64]; FADD R8, R8, R8"
    assert timed(load) == block.MEMORY + 4
    assert timed("LDS.128 R8, [R6]; FADD R8, R8, R8") == block.SHARED + 4
    # Eight warps, each of which takes the pipe for four cycles: the last, two cycles later, waits for seven others.
    assert timed(load, warps=8) == block.MEMORY + 4 + 7 * 4 - 2


def test_a_copy_costs_only_what_is_left_of_it() -> None:
    copy = "LDGSTS.E.BYPASS.128 [R6+0x200], desc[UR6][R2.64]; LDGDEPBAR; "
    wait = "DEPBAR.LE SB0, {:#x}"
    waited = block.MEMORY + 3  # the last of its four lines
    assert timed(copy + wait.format(0)) == waited + 1
    assert timed(copy + wait.format(1)) == 3  # the newest group need not be there
    work = "FADD R8, R8, R9; " * 100
    assert timed(copy + work + wait.format(0)) == waited + 1  # 400 cycles of work meanwhile are not added
    assert timed(copy + work + copy + wait.format(1)) == waited + 1


def test_a_barrier_waits_for_the_slowest_of_a_block() -> None:
    barrier, chain = "BAR.SYNC.DEFER_BLOCKING 0x0", "; ".join(["FADD R8, R8, R9"] * 50)
    assert timed(barrier) == block.BARRIER
    slow, fast = (steps_of(body, threads=64) for body in (f"{chain}; {barrier}", f"{barrier}; {chain}"))
    own = timed(chain)
    assert own == 49 * block.ARITHMETIC + 1
    nothing = cycles_together([steps_of("")], 1, H100)
    assert cycles_together([slow, slow], 1, H100) - nothing == own + block.BARRIER
    assert cycles_together([slow, fast], 1, H100) - nothing == own + block.BARRIER + own
    # Another block's warps have a barrier of their own, and the schedulers room for them.
    assert cycles_together([slow, fast], 2, H100) == cycles_together([slow, fast], 1, H100)


def test_a_register_says_which_barrier_and_of_how_many() -> None:
    both = "MOV R9, 0x400001; BAR.SYNC.DEFER_BLOCKING R9, R9"
    assert steps_of(both)[-2].barrier == (1, 64)
    assert steps_of("MOV R9, 0x1; BAR.SYNC.DEFER_BLOCKING R9, 0x40")[-2].barrier == (1, 64)
    assert steps_of("BAR.SYNC.DEFER_BLOCKING 0x0", threads=96)[-2].barrier == (0, 96)
    with pytest.raises(ValueError, match="a barrier does not open"):
        timed(both)


def test_a_measured_machine_has_its_copy_for_its_memory() -> None:
    calls = [call for call in json.loads(MEASURED.read_text())["calls"] if call["times"]]
    copies = [
        line["bytes"] / line["times"]["copy"]["us"]
        for line in calls[-1]["times"]
        if "bytes" in line and "copy" in line["times"]
    ]
    h100 = machine_of("sm_90")
    assert (h100.memory, h100.bandwidth) == ("measured copy", max(copies) * 1e6)
    assert 2e12 < h100.bandwidth < MACHINES["sm_90"].bandwidth
    assert machine_of("sm_80") == MACHINES["sm_80"]
    assert machine_of("sm_80").memory == "published"


def test_the_newest_call_that_has_cases_counts(tmp_path: Path) -> None:
    def call(commit: str, us: float) -> dict[str, object]:
        case = {"step": "time", "backend": "cuda", "op": "patch", "bytes": 8_000_000, "clocks": {"sm_mhz": 1500}}
        empty = {"op": "decode", "times": {"empty": {"us": 2.0}}}
        return {"device": "A", "commit": commit, "times": [case | {"times": {"ours": {}, "copy": {"us": us}}}, empty]}

    file = tmp_path / "gpu-a.json"
    file.write_text(json.dumps({"calls": [call("old", 9), call("new", 4), {"commit": "failed", "times": []}]}))
    found = machines.measured(file)
    assert found is not None
    assert (found.commit, found.copy, found.clock, found.empty) == ("new", 2e12, 1.5e9, 2e-6)
    assert machines.device_of(file) == "A"
    with pytest.raises(ValueError, match="A is not a machine of the model"):
        against.report(file)
    file = tmp_path / "gpu-b.json"
    file.write_text(json.dumps({"calls": [{"device": "A", "commit": "failed", "times": []}]}))
    assert machines.measured(file) is None
    with pytest.raises(ValueError, match="no times of the patch"):
        against.report(file)


def test_what_leaves_memory_as_the_bound_is_above_one() -> None:
    def row(instructions: int, latency: float | None) -> KernelRow:
        return nvidia_row(
            "hadamard_patch_forward", "cuda", "sm_90", "bfloat16", 4096, counts=Counter(FADD=instructions),
            registers=64, shared_bytes=0, warps=8, rows=1, latency=latency,
        )  # fmt: skip

    memory = BFLOAT16_ROW / machine_of("sm_90").bandwidth * 132 * machine_of("sm_90").clock
    assert row(100, None).dram_fraction == round(memory / 200, 3) > 7
    assert row(100, 2 * memory).dram_fraction == 0.5
    assert row(100, None).three_pass_fraction == row(200, None).three_pass_fraction  # memory holds both
    assert (row(1, None).status, row(1, 1.0).status) == (model.STATUS, CHECKED)


def check_limit(row: KernelRow, limit: KernelRow) -> None:
    for count in (
        "registers",
        "spills",
        "shared_bytes",
        "ldg",
        "stg",
        "shfl",
        "smem_wavefronts",
        "bar",
        "instructions",
    ):
        assert getattr(row, count) <= getattr(limit, count), (row.key, count)
    assert row.ldg - row.ldg128 <= limit.ldg - limit.ldg128  # what is not wide: H_m, and on AMD rows of d = 576
    assert row.stg - row.stg128 <= limit.stg - limit.stg128
    assert row.source == "triton" or row.stg == row.stg128
    assert limit.dram_fraction is None or (row.dram_fraction or 0) >= limit.dram_fraction


# Another version's compiler makes other code; tests/ops/test_triton_launches.py holds what each of them must not do.
OF_THIS_TRITON = pytest.mark.skipif(triton.__version__ != "3.9.0", reason="the limits are of Triton 3.9.0's code")


@OF_THIS_TRITON
def test_limits() -> None:
    """Those of one kernel; all of them are a job of minutes."""
    (limit,) = [row for row in LIMITS if row.key == ("hadamard_patch_forward", "triton", "sm_90", "bfloat16", 2048)]
    check_limit(triton_row("hadamard_patch_forward", "sm_90", "bfloat16", 2048), limit)


NVCC = pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")


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
@OF_THIS_TRITON
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
    assert {row.status for row in LIMITS} == {model.STATUS, CHECKED}
    assert {row.memory for row in LIMITS if row.arch == "sm_90"} == {"measured copy"}
    assert {row.key for row in LIMITS if row.spills} <= {
        ("hadamard_patch_forward", "cuda", arch, "bfloat16", 5120) for arch in ("sm_80", "sm_90", "sm_100", "sm_120")
    }  # 20 tiles a thread: tests/simt/test_compiles.py
    wide = [row for row in LIMITS if row.arch.startswith("sm_") and row.kernel not in LOSSES]  # they store one logit
    assert all(row.stg == row.stg128 for row in wide)
    of_memory = {("cuda", d): 1.4 for d in (2048, 3072, 4096, 5120, 8192)}
    for (source, d), least in (of_memory | {("triton", d): 1.2 for d in (2048, 4096, 8192)}).items():
        row = rows["hadamard_patch_forward", source, "sm_90", "bfloat16", d]
        assert row.ldg == row.ldg128
        assert row.dram_fraction is not None
        assert row.dram_fraction >= least
        assert row.three_pass_fraction is not None
        assert row.three_pass_fraction <= 0.334


@pytest.mark.slow
@NVCC
@pytest.mark.timeout(1800)
def test_measured_calls_are_predicted(tmp_path: Path) -> None:
    """Three cases of the newest call; all of them are a job of minutes."""
    whole = json.loads(MEASURED.read_text())
    newest = whole["calls"][-1]
    chosen = [("patch", 16384, 1024), ("norm", 16384, 2048), ("patch", 512, 2560)]
    kept = [line for line in newest["times"] if (line.get("op"), line.get("rows"), line.get("d")) in chosen]
    newest["times"] = [line for line in newest["times"] if line.get("op") == "decode"]
    newest["times"] += [line for line in kept if line["dtype"] == "bfloat16"]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"calls": [newest]}))
    call = machines.measured(file)
    assert call is not None
    found = list(against.predictions(call, machines.device_of(file)))
    assert len(found) == len(chosen)
    least, most = (float(number) for number in CHECKED.split() if number[0].isdigit())
    for one in found:
        assert isinstance(one, against.Prediction)
        assert least <= round(one.measured / one.predicted, 2) <= most, one.case
    assert "Measured over predicted" in against.report(file)


def test_command_writes_the_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "sm_90", "--d", "2048", "--source", "triton", "--json", str(tmp_path / "rows.json")]
    assert main(arguments) == 0
    assert model.STATUS in capsys.readouterr().out  # Triton's rows have no latency
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    asked = "kernel source arch dtype d registers spills shared_bytes ldg ldg128 stg stg128 shfl smem_wavefronts bar"
    assert {*asked.split(), "instructions", "dram_fraction", "memory"} <= set(row)
    assert (row["ldg"], row["stg"]) == (4, 4)
