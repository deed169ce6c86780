"""What people train a pruned model with: padded batches, weighted losses, half precision, adapters, tied pairs."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearpatch_kernels.files import record
from linearpatch_kernels.modeling.fused_loss import fuse_distillation_loss
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.nn import HadamardPatch, LowRankPatch
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from tests.support.field import IDS, SMALL, cut, linearpatch, logits, same, save_model, text_file, tiny

NORMALIZATIONS = ("topk", "full", "tail")
with_normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def answers(*shape: int, vocabulary: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [*shape, k] and probabilities that sum to 1."""
    ids = torch.rand(*shape, vocabulary, generator=generator).topk(k).indices
    probs = torch.rand(*shape, k, generator=generator)
    return ids, probs / probs.sum(-1, keepdim=True)


# --- the losses ------------------------------------------------------------------------------------------------------


@with_normalizations
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "phi3"])
def test_padding_counts_for_nothing(family: str, side: str, normalization: str) -> None:
    """The fused loss of a padded batch is the mean over its true tokens: optipfair #34, Liger-Kernel #974."""
    student = cut(tiny(family), {2: HadamardPatch(48, 4)})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (2, 12), generator=generator)
    slots, probs = answers(2, 12, vocabulary=97, k=5, generator=generator)
    fuse_distillation_loss(student, normalization=normalization)
    short = student(input_ids=ids[:1, :7], teacher_probs=probs[:1, :7], teacher_ids=slots[:1, :7]).loss
    whole = student(input_ids=ids[1:], teacher_probs=probs[1:], teacher_ids=slots[1:]).loss

    gap, stay = (slice(7, 12), slice(0, 7)) if side == "right" else (slice(0, 5), slice(5, 12))
    padded, padded_slots, padded_probs = ids.clone(), slots.clone(), probs.clone()
    for tensor, source in ((padded, ids), (padded_slots, slots), (padded_probs, probs)):
        tensor[0, stay] = source[0, :7]
    mask = torch.ones_like(ids)
    padded[0, gap], mask[0, gap], padded_slots[0, gap] = 0, 0, -1
    found = student(
        input_ids=padded,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        teacher_probs=padded_probs,
        teacher_ids=padded_slots,
    ).loss
    torch.testing.assert_close(found, (short * 7 + whole * 12) / 19, rtol=1e-4, atol=1e-4)
    found.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def expected_loss(hidden: Tensor, weight: Tensor, probs: Tensor, ids: Tensor, normalization: str) -> Tensor:
    """The mean over the tokens, in float64, by what the losses' docstrings say."""
    z, p = hidden.double() @ weight.double().T, probs.double()
    logp = z.gather(1, ids).log_softmax(1) if normalization == "topk" else z.log_softmax(1).gather(1, ids)
    loss = (p * (p.log() - logp)).sum(1)
    if normalization == "tail":
        rest = 1 - p.sum(1)
        loss = loss + rest * (rest.log() - (z.scatter(1, ids, -torch.inf).logsumexp(1) - z.logsumexp(1)))
    return loss.mean()


@with_normalizations
@pytest.mark.parametrize("given", ["hidden", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_weighted_loss_has_weighted_gradients(dtype: torch.dtype, given: str, normalization: str) -> None:
    """A loss times a weight, or inside another expression, had the gradient of the loss alone: Liger-Kernel #968,
    #678."""
    generator = torch.Generator().manual_seed(0)
    n, d, v, k = 9, 16, 40, 5
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(v, d, generator=generator)).to(dtype).requires_grad_()
    ids, probs = answers(n, vocabulary=v, k=k, generator=generator)
    probs = probs * (1 if normalization == "topk" else 0.8)

    def ours() -> Tensor:
        if given == "hidden":
            return linear_topk_kl_loss(hidden, weight, probs, ids, normalization=normalization)
        return topk_kl_loss(hidden @ weight.T, probs, ids, normalization=normalization)

    uses: dict[str, Any] = {
        **{f"times {factor}": (lambda loss, factor=factor: loss * factor) for factor in (1.0, 0.25, 1e-6, 3.0, -0.5)},
        "squared, and added to itself": lambda loss: loss.square() + 0.3 * loss,
    }
    tolerance = 4e-2 if dtype == torch.bfloat16 else 2e-5
    for use in uses.values():
        found = torch.autograd.grad(use(ours()), (hidden, weight))
        wanted = torch.autograd.grad(use(expected_loss(hidden, weight, probs, ids, normalization)), (hidden, weight))
        for one, other in zip(found, wanted, strict=True):
            assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@with_normalizations
@pytest.mark.parametrize("tokens", [9, 0])
def test_nothing_to_learn_from_is_zero(tokens: int, normalization: str) -> None:
    """All tokens ignored, or none there, gave 0/0: Liger-Kernel #974, trl #6006."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator, requires_grad=True)
    weight = torch.randn(40, 16, generator=generator, requires_grad=True)
    ids, probs = torch.full((tokens, 5), -1), torch.rand(tokens, 5, generator=generator)
    for loss in (
        linear_topk_kl_loss(hidden, weight, probs, ids, normalization=normalization),
        topk_kl_loss(hidden @ weight.T, probs, ids, normalization=normalization),
    ):
        assert float(loss.detach()) == 0
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert not gradient.any()  # a NaN is true


@with_normalizations
@pytest.mark.parametrize("masked", [slice(30, None), slice(0, 10), slice(1, None, 2)], ids=["end", "start", "odd"])
def test_a_masked_part_of_the_vocabulary(masked: slice, normalization: str) -> None:
    """Tokens that the student must not say stand at -inf (a padded head, a grammar): trl #6006."""
    generator = torch.Generator().manual_seed(0)
    n, v, k = 9, 40, 5
    allowed = torch.ones(v, dtype=torch.bool)
    allowed[masked] = False
    student = torch.randn(n, v, generator=generator).masked_fill(~allowed, -torch.inf).requires_grad_()
    inside, probs = answers(n, vocabulary=int(allowed.sum()), k=k, generator=generator)
    probs = probs * 0.8
    loss = topk_kl_loss(student, probs, allowed.nonzero().flatten()[inside], normalization=normalization)
    alone = topk_kl_loss(student[:, allowed], probs, inside, normalization=normalization)
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(loss, student)[0]
    assert bool(gradient.isfinite().all())
    assert not gradient[:, ~allowed].any()


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Any:
    """The share of the held-out KL that 40 steps take off, by the weights' dtype and --precision."""

    def share(dtype: torch.dtype, precision: str = "float32") -> float:
        folder = tmp_path_factory.mktemp("half")
        dense = save_model(tiny(initializer_range=0.1).to(dtype), folder / "dense")
        flags = ["--text", text, "--spans", "2:4", "--fit", "linearpatch", *SMALL]
        assert linearpatch("prune", dense, "-o", folder / "cut", *flags) is None
        flags = ["--text", text, "--length", 16, "--heldout", 4, "--batch-size", 2, "--device", "cpu"]
        training = ["--patch", "dense", "--train", "lora", "--lora-rank", 4, "--steps", 40, "--learning-rate", "3e-3"]
        arguments = ["--teacher", dense, "-o", folder / "out", "--precision", precision, *training, *flags]
        assert linearpatch("distill", folder / "cut", *arguments) is None
        curve = json.loads(record(folder / "out", "summary.json").read_text())["distillation"]["curve"]
        return 1 - min(point["tail"] for point in curve) / curve[0]["tail"]

    return share


def test_half_precision_learns_as_float32_does(healed: Any) -> None:
    """A student in float16 or bfloat16 learnt nothing, or NaN: OneTrainer #146, qlora-pipe #23."""
    whole = healed(torch.float32)
    assert whole > 0.1
    assert min(healed(torch.bfloat16), healed(torch.float16), healed(torch.float32, "bfloat16")) > 0.5 * whole


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, Any] = {
    "all-linear": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"),
    "dora": LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "qkv_proj", "down_proj"], use_dora=True
    ),
    "embeddings saved": LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["down_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "one layer": LoraConfig(
        r=2,
        task_type="CAUSAL_LM",
        target_modules=["down_proj"],
        layers_to_transform=[2],
        layers_pattern="layers",
    ),
    "patch saved": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["down_proj"], modules_to_save=["patch"]),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["o_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "phi3", "gemma3_text"])
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    dense = save_model(tiny(request.param), folder / "dense")
    flags = ["--spans", "2:4", "--fit", "hadamard-low-rank", "--text", text, *SMALL]
    assert linearpatch("prune", dense, "-o", folder / "out", *flags) is None
    return folder / "out"


def train_a_little(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_train_save_load_and_merge(pruned: Path, config: Any, tmp_path: Path) -> None:
    """The usual path of peft on an output: trained, saved, loaded on the output again, merged, saved, loaded."""
    before = logits(AutoModelForCausalLM.from_pretrained(pruned).eval())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pruned), copy.deepcopy(config))
    train_a_little(model)
    wanted = logits(model)
    assert not same(wanted, before)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), tmp_path / "adapter").eval()
    assert same(logits(again), wanted)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert same(logits(merged), wanted, 1e-3)


def test_an_adapter_can_be_switched_off(pruned: Path) -> None:
    """Two adapters on one output: each has its own effect, and without them the output is what it was."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pruned).eval(), copy.deepcopy(ADAPTERS["all-linear"]))
    with model.disable_adapter():
        before = logits(model)
    train_a_little(model)
    first = logits(model)
    model.add_adapter("second", copy.deepcopy(ADAPTERS["one layer"]))
    model.set_adapter("second")
    train_a_little(model)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not same(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


# --- tied pairs ------------------------------------------------------------------------------------------------------


def trained(student: PreTrainedModel) -> PreTrainedModel:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        student(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return student


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "qwen3", "mistral"])
def test_a_tied_pair_stays_one_through_training_and_saving(family: str, tmp_path: Path) -> None:
    """The head came apart from the embedding it is tied to: peft #2777."""
    student = trained(cut(tiny(family, tie_word_embeddings=True), {2: LowRankPatch(48, 2)}))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(student.named_parameters())
    again, _ = load_model(save_model(student, tmp_path / "out"), device="cpu")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert same(logits(again), logits(student))


def test_training_a_cut_model_leaves_the_dense_models_file_alone(tmp_path: Path) -> None:
    """Weights that are mapped from a file must not be written back to it."""
    place = save_model(tiny(tie_word_embeddings=True), tmp_path / "dense") / "model.safetensors"
    before = hashlib.sha256(place.read_bytes()).hexdigest()
    dense, _ = load_model(place.parent, device="cpu")
    first = logits(dense)
    student = cut(dense, {2: LowRankPatch(48, 2)})
    untrained = logits(student)
    assert not same(logits(trained(student)), untrained)
    assert hashlib.sha256(place.read_bytes()).hexdigest() == before
    assert torch.equal(logits(load_model(place.parent, device="cpu")[0]), first)
