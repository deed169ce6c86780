"""Triton's kernels as the host code launches them: how often they are compiled, and to what, without a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from benchmarks.triton_static import NORMALIZATIONS, Launch, driver_of, loss_launches, patch_launches
from linearpatch_kernels.ops.topk_kl import triton as losses


def keys(made: Iterable[Launch]) -> list[str]:
    with driver_of("sm_90"):
        return [launch.key() for launch in made]


@pytest.mark.parametrize("d", [64, 300])
def test_the_number_of_rows_compiles_no_patch_anew(d: int) -> None:
    first = keys(patch_launches(d, torch.bfloat16, rows=2))
    assert len(first) >= 6
    for rows in (1, 3, 16, 17, 32):
        assert keys(patch_launches(d, torch.bfloat16, rows=rows)) == first, rows


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_number_of_rows_compiles_no_loss_anew(normalization: str) -> None:
    first = keys(loss_launches(64, torch.bfloat16, normalization=normalization))
    assert len(first) >= 8
    for rows in (1, 3, 16, 17, 32):
        assert keys(loss_launches(64, torch.bfloat16, rows=rows, normalization=normalization)) == first, rows


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_number_of_slots_compiles_no_loss_anew(normalization: str) -> None:
    """Of those for which a program looks at the same number of slots at a time."""
    first = keys(loss_launches(64, torch.bfloat16, slots=9, normalization=normalization))
    for slots in (15, 16):
        assert keys(loss_launches(64, torch.bfloat16, slots=slots, normalization=normalization)) == first, slots


def test_the_vocabulary_compiles_no_linear_loss_over_slots_anew() -> None:
    def made(vocabulary: int) -> list[str]:
        every = loss_launches(64, torch.bfloat16, vocabulary=vocabulary)
        return keys(launch for launch in every if launch.kernel is not losses.vocabulary_gradient_kernel)

    assert made(200) == made(201) == made(208)
