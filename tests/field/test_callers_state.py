"""What the caller has set in torch before it calls us, as quantisation scripts leave it, changes no result.

Under ``torch.set_default_dtype(torch.bfloat16)`` a fit crashed and statistics lost their digits (pytorch/ao #2286).
Other states of the same kind: the default device, inference mode, grad mode, autocast.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import linearpatch_kernels
from linearpatch_kernels.calibration import Moments, NormedMoments, Span, calibrate
from linearpatch_kernels.distillation.forms import reformed
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainer import TrainingSettings, distill
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import evaluate_quality
from linearpatch_kernels.evaluation.latency import compare_speed
from linearpatch_kernels.evaluation.perplexity import perplexity
from linearpatch_kernels.hadamard import hadamard_transform
from linearpatch_kernels.healing.merge_search import plan_merging
from linearpatch_kernels.healing.merges import patch_merges, refit_merges
from linearpatch_kernels.merging.plan import apply_merges
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.nn import DensePatch, HadamardPatch, LowRankPatch
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import FITS, fit_patch
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.scores import scores_of_statistics
from linearpatch_kernels.pruning.search import plan_pruning
from linearpatch_kernels.report.pruning import joint_magnitudes
from linearpatch_kernels.text import token_windows
from linearpatch_kernels.torch_state import own_state
from tests.support.field import numbers, save_model, tiny
from tests.support.tiny import VOCABULARY, tiny_tokenizer

SPAN = Span(2, 4)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "in a meta context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}


@cache
def dense() -> PreTrainedModel:
    return tiny("llama")


@cache
def windows() -> Tensor:
    return torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))


def own_copy() -> PreTrainedModel:
    with torch.inference_mode(False):
        return copy.deepcopy(dense())


def planning(_: Path) -> Any:
    fit, held = windows()[:5], windows()[5:]
    found: dict[str, Any] = {"statistics": calibrate(dense(), fit.split(2), moments=[SPAN], normed=True)}
    for score in scores_of_statistics():
        found[score] = plan_pruning(dense(), fit, drop=2, score=score, fit="diagonal").plan
    for name in FITS:
        found[name] = fit_patch(found["statistics"].at(SPAN), name, rank=4)
    found["auto"] = plan_pruning(dense(), fit, held, drop=2, rank=4).plan
    found["loss"] = plan_pruning(dense(), fit, held, drop=2, score="loss", fit="linearpatch", rank=4).plan
    return found


def cutting(folder: Path) -> Any:
    plan_pruning(dense(), windows(), spans=[SPAN], fit="hadamard-low-rank", rank=4).plan.save(folder)
    loaded = PrunePlan.load(folder)
    cut = apply_plan(dense(), loaded)
    again = apply_plan(cut, PrunePlan(4, (Joint(Span(1, 2), None, "none"),)))
    return loaded, cut, again, reformed(loaded.joints[0].patch, "scales", 4)


def merging(_: Path) -> Any:
    found: list[Any] = []
    for settings in (MergeSettings(4), MergeSettings(4, skip_score="refit", width=None, posterior=True, grid=4)):
        merged, plan = plan_merging(dense(), windows()[:5], windows()[5:], settings)
        found += [merged, plan.tree, apply_merges(dense(), plan)]
    return [
        *found,
        patch_merges(dense(), merged, windows(), "low-rank", rank=4),
        refit_merges(dense(), merged, windows()).model,
    ]


def distilling(folder: Path) -> Any:
    write_teacher_store(dense(), windows(), folder / "store", top_k=10, depths=(2,))
    store = TeacherStore.open(folder / "store")
    plan = plan_pruning(dense(), windows(), spans=[SPAN], fit="low-rank", rank=4).plan
    found: list[Any] = [store.batch([0, 3], [2]).with_labels(0.1)]
    for train in ("patch", "suffix"):
        settings = TrainingSettings(steps=3, learning_rate=3e-3, train=train, label_weight=0.1)
        for _ in range(2):  # the second call goes on from the checkpoint of the first
            student = apply_plan(own_copy(), plan)
            distill(
                student, store, joint=2, training=range(6), heldout=[6, 7], settings=settings, directory=folder / train
            )
            found.append(student)
    return found


def evaluating(_: Path) -> Any:
    patch = HadamardPatch(48, device="cpu")
    joint = Joint(SPAN, patch, "test")
    cut = apply_plan(dense(), PrunePlan(6, (joint,)))
    compare_speed({"cut": cut}, prompt_tokens=4, new_tokens=2, repeats=1)
    quality = evaluate_quality(cut, windows(), dense()).to_dict()
    return perplexity(cut, windows()), quality, joint_magnitudes(dense(), windows(), joint)


def reading(folder: Path) -> Any:
    model, tokenizer = load_model(saved(folder), dtype=torch.float32)
    return model, token_windows(tokenizer, numbers(300), length=16)


def saved(folder: Path) -> Path:
    with own_state():
        return save_model(dense(), folder / "model", tiny_tokenizer())


def matrices(_: Path) -> Any:
    matrix = torch.linspace(-1, 1, 24 * 24, dtype=torch.float64, device="cpu").sin().view(24, 24)
    moments = torch.eye(24, dtype=torch.float64, device="cpu") + 0.1 * matrix @ matrix.T
    patches = [
        HadamardPatch.from_dense(matrix),
        HadamardPatch.from_dense(matrix, 3),
        HadamardPatch.from_dense(matrix, 3, second_moments=moments),
        LowRankPatch.from_dense(matrix, 3, second_moments=moments),
        DensePatch.from_dense(matrix),
    ]
    # Where a patch is made in inference mode by hand, it is as any other module is: not for training.
    return [(patch.to_dense(), [parameter.clone() for parameter in patch.parameters()]) for patch in patches]


def operators(_: Path) -> Any:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    found = []
    for d, dtype in ((12, torch.float32), (140, torch.bfloat16), (132, torch.float64)):
        x, scale, out = draw(3, d, dtype=dtype), draw(d), draw(3, d, dtype=dtype)
        down, up = draw(d, 2), draw(2, d)
        found += [hadamard_transform(x), hadamard_patch(x, scale), hadamard_patch(x, scale, down=down, up=up, out=out)]
        found += add_patch_rms_norm(x, x, scale, scale, 1e-6, pre_scale=scale)
    hidden, weight, probs = draw(5, 8), draw(20, 8), draw(5, 3).softmax(-1)
    ids = torch.arange(15, device="cpu").view(5, 3)
    for normalization in ("topk", "full", "tail"):
        found.append(linear_topk_kl_loss(hidden, weight, probs, ids, normalization=normalization))
        found.append(topk_kl_loss(hidden @ weight.T, probs, ids, normalization=normalization))
    return found


FLOWS = {
    flow.__name__: flow for flow in (planning, cutting, merging, distilling, evaluating, reading, matrices, operators)
}


def leaves(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a result consists of; a module is its parameters, a model also its logits, and both have to be trainable."""
    if isinstance(found, PrunePlan):
        found = {**found.tensors(), "joints": [(str(joint.span), joint.fit) for joint in found.joints]}
    if isinstance(found, PreTrainedModel):
        logits = found(windows()).logits
        logits.logsumexp(-1).sum().backward()
        found.zero_grad()
        yield f"{path}.logits", logits.detach()
    if isinstance(found, nn.Module):
        found = {name: (p.detach(), p.requires_grad, p.is_inference()) for name, p in found.named_parameters()}
    if hasattr(found, "mean_abs"):
        found = vars(found) | {"moments": {str(span): one for span, one in found.moments.items()}}
    if isinstance(found, Moments | NormedMoments):
        found = vars(found)
    if isinstance(found, dict):
        for key, value in found.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(found, list | tuple):
        for i, value in enumerate(found):
            yield from leaves(value, f"{path}.{i}")
    else:
        yield path, found


@cache
def wanted(flow: str, folder: Path) -> dict[str, Any]:
    return dict(leaves(FLOWS[flow](folder)))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and one.equal(other)
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


# Under autocast, evaluating measures the model as the caller runs it, and the flow of operators has matrix products of
# its own, which are narrowed: neither is a result of ours.
CASES = [
    (flow, state)
    for flow in FLOWS
    for state in STATES
    if (flow, state) not in (("evaluating", "autocast"), ("operators", "autocast"))
]


@pytest.mark.parametrize(("flow", "state"), CASES)
def test_no_result_depends_on_it(
    flow: str, state: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if flow not in FOLDERS:
        FOLDERS[flow] = tmp_path_factory.mktemp(flow)
    expected = wanted(flow, FOLDERS[flow])
    with STATES[state]():
        result = FLOWS[flow](tmp_path)
    found = dict(leaves(result))
    assert found.keys() == expected.keys()
    assert [path for path in expected if not same(found[path], expected[path])] == []


FOLDERS: dict[str, Path] = {}


def test_the_caller_finds_its_state_again() -> None:
    with default_dtype(torch.bfloat16), torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
        with own_state():
            assert torch.empty(1).dtype == torch.float32
            assert torch.empty(1).device.type == "cpu"
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
        with pytest.raises(ValueError, match="on purpose"), own_state():
            raise ValueError("on purpose")
        assert torch.empty(1).dtype == torch.bfloat16
        assert torch.empty(1).device.type == "meta"
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        with own_state():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_weights_of_inference_mode_are_refused_before_a_training(tmp_path: Path) -> None:
    store = write_teacher_store(dense(), windows(), tmp_path / "store", top_k=10)
    with torch.inference_mode():
        student = apply_plan(copy.deepcopy(dense()), PrunePlan(6, (Joint(SPAN, DensePatch(48), "test"),)))
    with pytest.raises(
        InputError, match=r"weights made in torch.inference_mode cannot be trained: load the model outside"
    ):
        distill(student, store, joint=2, training=range(6), heldout=[6, 7], settings=TrainingSettings(steps=1))


# Whose result is floating unless a dtype is given, or takes its dtype from Python numbers.
MAKERS = {
    *("zeros", "ones", "empty", "empty_strided", "full", "eye", "linspace", "logspace", "rand", "randn", "normal"),
    *("tensor", "as_tensor", "asarray", "scalar_tensor"),
}
PACKAGE = Path(linearpatch_kernels.__file__).parent


@pytest.mark.parametrize("file", sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")))
def test_every_tensor_says_its_dtype_where_it_is_made(file: str) -> None:
    calls = [node for node in ast.walk(ast.parse((PACKAGE / file).read_text())) if isinstance(node, ast.Call)]
    made = [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch" and call.func.attr in MAKERS
    ]
    silent = [ast.unparse(call) for call in made if "dtype" not in {keyword.arg for keyword in call.keywords}]
    assert silent == []
