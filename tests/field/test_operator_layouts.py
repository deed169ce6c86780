"""The operators at every width, layout and size, and from the threads and processes that people call them in."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from linearpatch_kernels import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.hadamard import hadamard_matrix, hadamard_transform
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from tests.support.field import same

NORMALIZATIONS = ("topk", "full", "tail")
WIDTHS = [*range(1, 130), 144, 172, 188, 192, 236, 260, 268, 292, 300, 428, 576, 640, 668, 716, 760, 768, 896, 960]
WIDE = [1000, 1152, 1536, 2304, 2560, 3072]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_matrix(x: Tensor, scale: Tensor) -> Tensor:
    h = hadamard_matrix(x.shape[-1]).double()
    return (x.double() @ h * scale.double()) @ h.T


def teacher(tokens: int, vocabulary: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """True probabilities [tokens, k] that leave a tenth to the rest, and their ids."""
    ids = torch.rand(tokens, vocabulary, generator=generator).topk(k).indices
    probs = torch.rand(tokens, k, generator=generator)
    return probs / probs.sum(1, keepdim=True) * 0.9, ids


@pytest.mark.parametrize("d", [*WIDTHS, *WIDE])
def test_there_and_back_is_the_identity_at_every_width(d: int) -> None:
    """Widths with a factor of 12 or 20 gave a matrix that was not orthogonal: fast-hadamard-transform #9."""
    h = hadamard_matrix(d).double()
    torch.testing.assert_close(h @ h.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-5)
    x, scale = torch.randn(5, d, generator=drawn(d)), torch.rand(d, generator=drawn(1)) + 0.5
    wanted = by_matrix(x, scale).float()
    torch.testing.assert_close(hadamard_patch(x, scale), wanted, rtol=1e-4, atol=1e-4)
    there_and_back = hadamard_transform(hadamard_transform(x) * scale, inverse=True)
    torch.testing.assert_close(there_and_back, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x, inverse=True)), x, rtol=1e-4, atol=1e-4)


def test_more_rows_than_a_grid_dimension_has_blocks() -> None:
    """65,535 is as far as a grid's second axis goes: apex #411, pytorch #25241."""
    x, scale = torch.randn(70_001, 12, generator=drawn()), torch.rand(12, generator=drawn(1)) + 0.5
    x.requires_grad_(), scale.requires_grad_()
    parts = torch.cat([hadamard_patch(part, scale) for part in x.split(1000)])
    whole = hadamard_patch(x, scale)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)
    outer = torch.randn(x.shape, generator=drawn(2))
    for found, wanted in zip(
        torch.autograd.grad(whole, (x, scale), outer), torch.autograd.grad(parts, (x, scale), outer), strict=True
    ):
        assert same(found, wanted, 1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_more_tokens_than_a_grid_dimension_has_blocks(normalization: str) -> None:
    """The losses on 66,000 tokens, given as logits and as hidden states: mlx #2161."""
    generator = drawn()
    tokens, half = 66_000, 33_000
    logits = torch.randn(tokens, 33, generator=generator)
    probs, ids = teacher(tokens, 33, 4, generator)
    parts = [
        topk_kl_loss(logits[part], probs[part], ids[part], normalization=normalization)
        for part in (slice(0, half), slice(half, None))
    ]
    whole = topk_kl_loss(logits, probs, ids, normalization=normalization)
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-5)
    weight = torch.eye(33)
    linear = linear_topk_kl_loss(logits, weight, probs, ids, normalization=normalization)
    torch.testing.assert_close(linear, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_more_numbers_than_32_bits_count() -> None:
    """An index of 32 bits turns negative behind 2^31 numbers: pytorch #111484. Takes 4.3 GB, in place."""
    rows, d = 2**31 // 4096 + 3, 4096
    x = torch.zeros(rows, d, dtype=torch.bfloat16)
    last, scale = torch.randn(4, d, generator=drawn()).bfloat16(), torch.rand(d, generator=drawn(1)) + 0.5
    x[-4:] = last
    with torch.no_grad():
        assert torch.equal(hadamard_patch(x, scale, out=x)[-4:], hadamard_patch(last, scale))
    assert not x[:-4].any()


def laid_out(name: str, d: int, dtype: torch.dtype) -> Tensor:
    generator = drawn(d)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    base = r(9, 2 * d + 3)
    return {
        "every other column": lambda: base[:, 0 : 2 * d : 2],
        "one element off": lambda: base.flatten()[1 : 1 + 8 * d].view(8, d),
        "transposed": lambda: r(d, 7).T,
        "expanded": lambda: r(1, d).expand(6, d),
        "a constant": lambda: torch.ones(1, 1, dtype=dtype).expand(5, d),
        "four axes, permuted": lambda: r(2, d, 3, 4).permute(2, 0, 3, 1),
        "no rows": lambda: r(0, d),
        "one axis": lambda: r(d),
        "overlapping rows": lambda: base.flatten().as_strided((6, d), (1, 1)),
        "reversed by a gather": lambda: base[:, :d].flip(0)[::2],
    }[name]()


LAYOUTS = (
    "every other column",
    "one element off",
    "transposed",
    "expanded",
    "a constant",
    "four axes, permuted",
    "no rows",
    "one axis",
    "overlapping rows",
    "reversed by a gather",
)


@pytest.mark.parametrize("low_rank", [False, True], ids=["scale", "low-rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_an_input_lies_in_memory_makes_no_difference(layout: str, dtype: torch.dtype, low_rank: bool) -> None:
    """Views, and gradients that are views, were read as if they were contiguous: fast-hadamard-transform, pytorch
    #197636."""
    tolerance = 1e-6 if dtype in (torch.float32, torch.float64) else 1e-2
    for d in (12, 40, 48, 64, 576):
        x, generator = laid_out(layout, d, dtype), drawn(1)
        scale = (torch.randn(2 * d, generator=generator).to(dtype).abs() + 0.5)[::2]
        extra = {
            "down": torch.randn(3, d, generator=generator).to(dtype).T * 0.1,
            "up": torch.randn(d, 3, generator=generator).to(dtype).T * 0.1,
        } if low_rank else {}  # fmt: skip
        dense = {name: tensor.contiguous() for name, tensor in extra.items()}
        wanted = hadamard_patch(x.contiguous(), scale.contiguous(), **dense)
        assert x.numel() == 0 or same(hadamard_patch(x, scale, **extra).double(), wanted.double(), tolerance)
        if not x.numel():
            assert hadamard_patch(x, scale, **extra).shape == x.shape
            continue
        # The gradient arrives as one number that is expanded, as .sum() sends it.
        outer = torch.ones((), dtype=dtype).expand(x.shape)
        leaf, twin = x.detach(), x.detach().contiguous().clone()
        leaf.requires_grad_(), twin.requires_grad_()
        found = torch.autograd.grad(hadamard_patch(leaf, scale, **extra), leaf, outer)[0]
        expected = torch.autograd.grad(hadamard_patch(twin, scale.contiguous(), **dense), twin, outer.contiguous())[0]
        assert same(found.double(), expected.double(), tolerance)
        with torch.no_grad():
            fused = add_patch_rms_norm(x, x, scale, scale, 1e-6)
            apart = add_patch_rms_norm(x.contiguous(), x.contiguous(), scale.contiguous(), scale.contiguous(), 1e-6)
        assert all(same(one.double(), other.double(), 1e-2) for one, other in zip(fused, apart, strict=True))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_the_losses_operands_lie_makes_no_difference(dtype: torch.dtype, normalization: str) -> None:
    """Hidden states that are a part of wider rows, a transposed head, every other id: as above, the gradients too."""
    generator = drawn()
    hidden = torch.randn(11, 34, generator=generator).to(dtype)[:, 1:33]
    weight = torch.randn(33, 70, generator=generator).to(dtype)[1:, :].T  # [70, 32]
    probs, ids = teacher(11, 70, 6, generator)
    ids, probs = ids.T.contiguous().T[:, ::2], probs.T.contiguous().T[:, ::2]
    views = (hidden, weight, probs, ids)
    packed = tuple(tensor.contiguous().clone() for tensor in views)
    losses = []
    for h, w, p, i in (views, packed):
        h.requires_grad_(), w.requires_grad_()
        loss = linear_topk_kl_loss(h, w, p, i, normalization=normalization)
        losses.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    for found, wanted in zip(*losses, strict=True):
        assert same(found, wanted, 1e-5 if dtype == torch.float32 else 2e-2)
    logits = (hidden.detach().float() @ weight.detach().float().T).T.contiguous().T
    by_logits = topk_kl_loss(logits, probs, ids, normalization=normalization)
    assert same(losses[0][0].float(), by_logits.float(), 1e-4 if dtype == torch.float32 else 2e-2)


def test_many_threads_call_at_once() -> None:
    """A server's threads make their calls at the same time, of widths that nobody has used before."""
    widths = [132, 148, 152, 156, 164, 176, 180, 184, 196, 204, 208, 212, 220, 224, 228, 240, 252, 272, 276, 280]
    inputs = {d: (torch.randn(6, d, generator=drawn(d)), torch.rand(d, generator=drawn(1)) + 0.5) for d in widths}

    def work(i: int) -> tuple[int, Tensor, Tensor]:
        d = widths[i % len(widths)]
        x, scale = (tensor.clone().requires_grad_() for tensor in inputs[d])
        y = hadamard_patch(x, scale)
        return d, y.detach(), torch.autograd.grad(y.square().sum(), scale)[0]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(work, range(200)))
    assert len(found) == 200
    for d, y, gradient in found:
        x, scale = (tensor.double() for tensor in inputs[d])
        assert same(y.double(), by_matrix(x, scale))
        # d/ds of |x H diag(s) H'|^2, for an orthogonal H
        assert same(gradient.double(), 2 * scale * (x @ hadamard_matrix(d).double()).square().sum(0))


_OTHER_PROCESSES = """
import json
from concurrent.futures import ThreadPoolExecutor
import torch
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(4)
from linearpatch_kernels import hadamard_patch
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss

def patch(d):
    x = torch.linspace(-1, 1, 512 * d).view(512, d)
    return float(hadamard_patch(x, torch.linspace(0.5, 1.5, d)).double().sum())

def loss(d):
    hidden, head = torch.linspace(-1, 1, 64 * d).view(64, d), torch.linspace(-0.1, 0.1, 3000 * d).view(3000, d)
    ids = torch.arange(8).expand(64, 8).contiguous()
    return float(linear_topk_kl_loss(hidden, head, torch.full((64, 8), 1 / 8), ids, normalization="full"))

class Patched(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return [patch(576), loss(64)]

with ThreadPoolExecutor(8) as pool:
    first = list(pool.map(patch, [576, 640] * 16))
expected = [patch(576), loss(64)]
loader = DataLoader(Patched(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
print(json.dumps({"threads": first, "alone": [patch(576), patch(640)], "expected": expected, "workers": list(loader)}))
"""


@pytest.mark.slow
def test_a_data_loaders_workers_and_a_servers_threads() -> None:
    """After the parent has used several threads, an operator in a forked process hung: faiss #5206, pytorch #17199,
    #75147.

    A bare fork hangs in torch's own matrix product too (the pool of OpenMP does not survive it), so what must work is
    what works for torch: a forked process that was told to use one thread, as a DataLoader tells its workers. The same
    process makes its very first calls from eight threads.
    """
    done = subprocess.run([sys.executable, "-c", _OTHER_PROCESSES], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["threads"] == pytest.approx(found["alone"] * 16, rel=1e-6)
    assert len(found["workers"]) == 4
    for worker in found["workers"]:
        assert worker == pytest.approx(found["expected"], rel=1e-5)
