"""The fused distillation loss in a model: the same loss, gradients and training curve as with its logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from benchmarks.studies.topk_kl_training import curves
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.fused_loss import fuse_distillation_loss
from linearpatch_kernels.ops.topk_kl import topk_kl_loss
from tests.support.tiny import VOCABULARY, tiny_model, tiny_patched_model

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
}


def scaled_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "granite":
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
        return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)).eval()
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)).eval()
    return Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)).eval()


def models() -> dict[str, Any]:
    return {
        "llama": lambda: tiny_model("llama", layers=2),
        "qwen2": lambda: tiny_model("qwen2", layers=2),
        "gemma3_text": lambda: tiny_model("gemma3_text", layers=2),
        "patched llama": lambda: tiny_patched_model("llama"),
        "granite": lambda: scaled_model("granite"),
        "cohere2": lambda: scaled_model("cohere2"),
        "gemma2": lambda: scaled_model("gemma2"),
    }


def batch(size: int = 2, tokens: int = 9, k: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (size, tokens, k))
    ids[0, :2] = -1
    return {
        "input_ids": torch.randint(3, VOCABULARY, (size, tokens)),
        "teacher_probs": torch.rand(size, tokens, k).softmax(-1) * 0.9,
        "teacher_ids": ids,
    }


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("normalization", ["topk", "tail"])
def test_loss_and_gradients_are_those_of_the_logits(name: str, normalization: str) -> None:
    model, given = models()[name](), batch()
    logits = model(input_ids=given["input_ids"]).logits
    flat = [given[key].flatten(0, 1) for key in ("teacher_probs", "teacher_ids")]
    expected = topk_kl_loss(logits.flatten(0, 1).float(), *flat, normalization=normalization, temperature=1.5)
    expected_gradients = gradients(model, expected)
    undo = fuse_distillation_loss(model, normalization=normalization, temperature=1.5)
    output = model(**given)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    ours = gradients(model, output.loss)
    assert ours.keys() == expected_gradients.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-6)
    assert model(input_ids=given["input_ids"]).logits.equal(logits)
    undo()
    assert "forward" not in vars(model)


def test_logits_that_no_option_explains_are_refused_in_one_line() -> None:
    model = tiny_model("llama", layers=1)
    model.lm_head.register_forward_hook(lambda _module, _args, output: output.abs())
    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        output.logits = output.logits.sqrt()
        return output

    model.forward = forward
    with pytest.raises(InputError, match="does something to its logits that no known option") as refused:
        fuse_distillation_loss(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere2"])
@pytest.mark.parametrize("normalization", ["topk", "full", "tail"])
def test_capped_and_scaled_logits_against_float64(name: str, normalization: str) -> None:
    """The float32 model's loss and gradients within the error that its own logits would give."""
    model, given = scaled_model(name), batch()
    flat = [given[key].flatten(0, 1) for key in ("teacher_probs", "teacher_ids")]

    def by_logits(one: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
        logits = one(input_ids=given["input_ids"]).logits
        loss = topk_kl_loss(logits.flatten(0, 1), *flat, normalization=normalization, temperature=1.5)
        return loss.detach(), gradients(one, loss)

    exact, exact_gradients = by_logits(copy.deepcopy(model).double())
    plain, plain_gradients = by_logits(model)
    fuse_distillation_loss(model, normalization=normalization, temperature=1.5)
    loss = model(**given).loss
    ours = gradients(model, loss)
    assert (loss - exact).abs() <= 2 * (plain - exact).abs() + 1e-5
    for key, true in exact_gradients.items():
        allowed = 2 * (plain_gradients[key] - true).abs().max() + 1e-5 * true.abs().max()
        assert (ours[key] - true).abs().max() <= allowed, key


def test_an_unknown_head_is_refused() -> None:
    model = tiny_model("llama", layers=1)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="head of type Sequential cannot be fused"):
        fuse_distillation_loss(model)


def test_slots_of_other_tokens_are_refused() -> None:
    model, given = tiny_model("llama", layers=1), batch()
    fuse_distillation_loss(model)
    with pytest.raises(InputError, match="teacher_ids must be"):
        model(**{**given, "input_ids": given["input_ids"][:, :-1]})


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_trainer_runs_it(name: str, tmp_path: Path) -> None:
    """The example of the documentation, word for word, against the mean of the windows' losses."""
    model = models()[name]()
    windows = [{key: value[0] for key, value in batch(1).items()} for _ in range(4)]
    fuse_distillation_loss(model)
    with torch.no_grad():
        first = torch.stack([model(**{k: v[None] for k, v in window.items()}).loss for window in windows]).mean()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=windows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(first.item(), rel=1e-3)
    assert losses[-1] < losses[0]


def test_fifty_steps_give_the_curve_of_the_papers_four_lines() -> None:
    teacher, k = tiny_model("llama", layers=4, seed=1), 8
    windows = torch.randint(3, VOCABULARY, (50, 1, 24))

    def curve(fused: bool) -> list[float]:
        student = tiny_model("llama", layers=2, seed=2).train()
        if fused:
            fuse_distillation_loss(student)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        losses = []
        for window in windows:
            with torch.no_grad():
                top = teacher(input_ids=window).logits.topk(k)
            probs = top.values.softmax(-1)
            if fused:
                loss = student(input_ids=window, teacher_probs=probs, teacher_ids=top.indices).loss
            else:
                gathered = student(input_ids=window).logits.gather(-1, top.indices).log_softmax(-1).flatten(0, 1)
                loss = torch.nn.functional.kl_div(gathered, probs.flatten(0, 1), reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, paper = curve(True), curve(False)
    assert ours == pytest.approx(paper, rel=1e-4)
    assert sum(ours[-5:]) < 0.8 * sum(ours[:5])


@pytest.mark.slow
@pytest.mark.demo
def test_fifty_steps_of_the_demo_model_give_the_curve_of_the_papers_four_lines() -> None:
    paper, ours = curves(steps=50, tokens=16)
    assert ours == pytest.approx(paper, rel=1e-4)
    assert sum(ours[-10:]) < sum(ours[:10])
