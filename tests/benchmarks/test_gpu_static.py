"""The static model against worked numbers, the counter against programs written by hand, the kernels against limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_static
from benchmarks.gpu_static import (
    DEFAULT_DS,
    MACHINES,
    KernelRow,
    WarpCounts,
    executed,
    modelled_cycles,
    read_rows,
    sass_functions,
    three_pass_cycles,
    triton_row,
    triton_selection,
    warp_counts,
)

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
    (blocks,) = sass_functions(PROGRAM).values()
    counts = executed(blocks, trips=(5, 3))
    assert counts["LDG.E.128"] == counts["STG.E.64"] == counts["STS.128"] == 1
    assert counts["FADD"] == 5
    assert counts["SHFL.BFLY"] == 15
    assert "EXIT" not in counts
    assert warp_counts(counts) == WarpCounts(instructions=1 + 5 + 15 + 15 + 5 + 6, fp=5, shfl=15, smem_wavefronts=8)


def test_a_loop_of_unknown_length_is_an_error() -> None:
    (blocks,) = sass_functions(PROGRAM).values()
    with pytest.raises(ValueError, match="2 loops within the loop over rows, and the trip counts of 0 are known"):
        executed(blocks)


def test_code_that_cannot_be_followed_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be followed"):
        sass_functions(PROGRAM.replace("BRA `(.L_x_0)", "BRX R4 -0x10"))


def check_limit(row: KernelRow, limit: KernelRow) -> None:
    assert row.spills == 0
    for count in ("registers", "shared_bytes", "ldg", "stg", "shfl", "smem_wavefronts", "bar", "instructions"):
        assert getattr(row, count) <= getattr(limit, count), (row.key, count)
    assert row.ldg - row.ldg128 <= limit.ldg - limit.ldg128  # what is not wide: H_m, and on AMD rows of d = 576
    assert row.stg - row.stg128 <= limit.stg - limit.stg128
    assert limit.dram_fraction is None or (row.dram_fraction or 0) >= limit.dram_fraction


def test_limits() -> None:
    """Those of one kernel; all of them are a job of minutes."""
    (limit,) = [row for row in LIMITS if row.key == ("hadamard_patch_forward", "triton", "sm_90", "bfloat16", 2048)]
    check_limit(triton_row("hadamard_patch_forward", "sm_90", "bfloat16", 2048), limit)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted({row.arch for row in LIMITS}))
def test_all_limits(arch: str) -> None:
    limits = [row for row in LIMITS if row.source == "triton" and row.arch == arch]
    assert [row.key for row in limits] == [
        (kernel, "triton", *others) for kernel, *others in triton_selection([arch], DEFAULT_DS)
    ]
    for limit in limits:
        check_limit(triton_row(limit.kernel, limit.arch, limit.dtype, limit.d), limit)


def test_limits_keep_the_promises() -> None:
    rows = {row.key: row for row in LIMITS}
    assert {row.status for row in LIMITS} == {"modelled, unvalidated"}
    assert all(row.spills == 0 for row in LIMITS)
    assert all(row.stg == row.stg128 for row in LIMITS if row.arch.startswith("sm_"))
    for d in (2048, 4096, 8192):
        row = rows["hadamard_patch_forward", "triton", "sm_90", "bfloat16", d]
        assert row.ldg == row.ldg128
        assert row.dram_fraction is not None
        assert row.dram_fraction >= 0.90
        assert row.three_pass_fraction is not None
        assert row.three_pass_fraction <= 0.4


def test_command_writes_the_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_static.main(["--arch", "sm_90", "--d", "2048", "--json", str(tmp_path / "rows.json")]) == 0
    assert "modelled, unvalidated" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    asked = "kernel source arch dtype d registers spills shared_bytes ldg ldg128 stg stg128 shfl smem_wavefronts bar"
    assert {*asked.split(), "instructions", "dram_fraction"} <= set(row)
    assert (row["ldg"], row["stg"]) == (4, 4)
