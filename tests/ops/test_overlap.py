"""Whether tensors share memory, against a count of every byte."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from linearpatch_kernels.ops.overlap import apart, same_elements, share_memory


def addresses(tensor: Tensor) -> list[int]:
    """Of every byte of every element, as often as an element has it."""
    places = [tensor.data_ptr()]
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = [place + i * stride * tensor.element_size() for place in places for i in range(size)]
    return [place + byte for place in places for byte in range(tensor.element_size())]


def random_view(memory: Tensor, chance: random.Random) -> Tensor:
    dtype = chance.choice([torch.float16, torch.float32, torch.float64])
    numbers = memory[: len(memory) // 8 * 8].view(dtype)
    sizes = [chance.randint(0 if chance.random() < 0.1 else 1, 4) for _ in range(chance.randint(0, 3))]
    strides = [chance.randint(0, 7) for _ in sizes]
    reach = sum(max(size - 1, 0) * stride for size, stride in zip(sizes, strides, strict=True))
    return numbers.as_strided(sizes, strides, chance.randint(0, max(0, len(numbers) - reach - 1)))


def test_it_is_what_a_count_of_all_bytes_says() -> None:
    chance = random.Random(0)
    answers = set()
    for _ in range(1000):
        memory = torch.zeros(8 * 80, dtype=torch.uint8)
        a, b = random_view(memory, chance), random_view(memory, chance)
        of_a, of_b = addresses(a), addresses(b)
        assert share_memory(a) == (len(set(of_a)) < len(of_a)), (a.shape, a.stride())
        assert share_memory(a, b) == share_memory(b, a) == bool(set(of_a) & set(of_b))
        assert not (apart(a, b) and share_memory(a, b))
        answers.add((share_memory(a), share_memory(a, b), apart(a, b)))
    assert len(answers) == 6  # all that can be


def test_it_goes_by_addresses() -> None:
    array = np.zeros(8, dtype=np.float32)
    a, b = torch.from_numpy(array), torch.from_numpy(array[4:])
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert share_memory(a, b)
    assert not share_memory(a[:4], b)
    assert same_elements(a[4:], b)
    assert not same_elements(a[3:7], b)
    assert not same_elements(a[4::2], b[:2])


def test_elements_that_lie_between_each_other_are_not_shared() -> None:
    base = torch.zeros(4, 10)
    assert not apart(base[:, ::2], base[:, 1::2])
    assert not share_memory(base[:, ::2], base[:, 1::2])
    assert share_memory(base[:, ::2], base[:, ::3])
    assert share_memory(base[:, ::2], base[2:3, 4].expand(3, 5))  # read many times, from one place


@pytest.mark.parametrize("state", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_the_callers_state_changes_nothing(state: object) -> None:
    base = torch.zeros(4, 10)
    with state():  # type: ignore[operator]
        assert share_memory(base[:, ::2], base[:, ::3])
        assert share_memory(base.as_strided((3, 4), (3, 2)))
