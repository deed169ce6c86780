"""A model of an 8B Llama's shape with random weights: what the operators are worth where people use them.

Decoding (one token, static cache) and prefill under CUDA graphs: all layers, five of them gone without a patch, with
a dense patch, with the fused one, and with the fused one that is the next layer's norm as well; then seconds and memory
of calibration and of a distillation step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.gpu_day.surroundings import DEVICE, DRY, clocks, failure, say, synchronize
from tools.gpu_day.timing import measure, prepared

JOINT, DROPPED = 20, 5
PROMPT, CONTEXT = (16, 64) if DRY else (2048, 2560)
WINDOWS, KEPT = 4, 100
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def random_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(SMALL if DRY else LLAMA_8B), max_position_embeddings=8192)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def fuse_norm(model: Any, scale: Tensor) -> None:
    """What an engine does at the joint: the residual's addition, the patch and the next layer's norm are one kernel."""
    from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm

    before, after = model.model.layers[JOINT - 1 : JOINT + 1]
    held: dict[str, Tensor] = {}

    def leaves_the_sum_open(hidden_states: Tensor, **others: Any) -> Tensor:
        attended, _ = before.self_attn(hidden_states=before.input_layernorm(hidden_states), **others)
        held["residual"] = hidden_states + attended
        return before.mlp(before.post_attention_layernorm(held["residual"]))

    def begins_with_the_sum(hidden_states: Tensor, **others: Any) -> Tensor:
        norm = after.input_layernorm
        normed, residual = add_patch_rms_norm(
            hidden_states, held["residual"], scale, norm.weight, norm.variance_epsilon
        )
        attended, _ = after.self_attn(hidden_states=normed, **others)
        residual = residual + attended
        return residual + after.mlp(after.post_attention_layernorm(residual))

    before.forward, after.forward = leaves_the_sum_open, begins_with_the_sum


def variants(dense: Any) -> dict[str, Callable[[], Any]]:
    from linearpatch_kernels.modeling.cut import keep_layers
    from linearpatch_kernels.modeling.patched import patched_model
    from linearpatch_kernels.nn import DensePatch, HadamardPatch

    width, depth = dense.config.hidden_size, dense.config.num_hidden_layers
    kept = [layer for layer in range(depth) if not JOINT <= layer < JOINT + DROPPED]
    hadamard, matrix = HadamardPatch(width), DensePatch(width)
    with torch.no_grad():
        hadamard.scale.uniform_(0.5, 1.5)
        matrix.weight.copy_(torch.eye(width))

    def cut() -> Any:
        return keep_layers(dense, kept)

    def fused_norm() -> Any:
        model = cut()
        fuse_norm(model, hadamard.scale.to(DEVICE))
        return model

    return {
        "all layers": lambda: dense,
        "cut, no patch": cut,
        "cut, dense patch": lambda: patched_model(cut(), {JOINT: matrix}),
        "cut, fused patch": lambda: patched_model(cut(), {JOINT: hadamard}),
        "cut, fused norm": fused_norm,
    }


def _decoding_step(model: Any) -> Callable[[int], Any]:
    """One token behind a prompt in a static cache; without a cache where Transformers' cannot be used so."""
    from transformers import StaticCache

    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=DEVICE)
    token, position = ids[:, :1], torch.tensor([PROMPT], device=DEVICE)
    seen = (torch.arange(CONTEXT, device=DEVICE) <= PROMPT)[None, None, None]
    try:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def cached(_: int) -> Any:
            return model(
                input_ids=token, past_key_values=cache, use_cache=True, cache_position=position,
                position_ids=position[None], attention_mask=seen,
            ).logits  # fmt: skip

        cached(0)
        return cached
    except Exception as error:
        say(step="no cache", reason=failure(error))
        return lambda _: model(input_ids=token, use_cache=False).logits


def _prefill(model: Any) -> Callable[[int], Any]:
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=DEVICE)
    return lambda _: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


@torch.no_grad()
def speed(dense: Any) -> None:
    for name, step in {"decode": _decoding_step, "prefill": _prefill}.items():
        entries = {}
        for variant, make in variants(dense).items():
            try:
                # A variant's layers may be changed in place, so that each is captured before the next is made.
                model = make()
                entries[variant] = prepared(step(model), 1)
                for layer in model.model.layers[JOINT - 1 : JOINT + 1]:
                    vars(layer).pop("forward", None)
            except Exception as error:
                say(step="failed", call=[name, variant], error=failure(error))
        say(step="model", op=name, prompt=PROMPT, times=measure(entries, rounds=7), clocks=clocks())


def _timed(name: str, run: Callable[[], Any], **about: Any) -> None:
    if not DRY:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    seconds = round(time.perf_counter() - begin, 3)
    gigabytes = None if DRY else round(torch.cuda.max_memory_allocated() / 1e9, 2)
    say(step="model", op=name, seconds=seconds, peak_gb=gigabytes, **about)


def training(dense: Any) -> None:
    from linearpatch_kernels.calibration import calibrate
    from linearpatch_kernels.modeling.patched import patches
    from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss

    ids = torch.randint(0, dense.config.vocab_size, (WINDOWS, PROMPT), device=DEVICE)
    for again in range(2):
        _timed("calibrate", lambda: calibrate(dense, list(ids.split(1))), tokens=ids.numel(), again=bool(again))
    student = variants(dense)["cut, fused patch"]()
    scale = patches(student)[JOINT][0].scale.requires_grad_()
    optimizer = torch.optim.AdamW([scale], lr=1e-4)
    probs = torch.rand(PROMPT, KEPT, device=DEVICE).softmax(1)
    teacher = torch.randint(0, dense.config.vocab_size, (PROMPT, KEPT), device=DEVICE)

    def step() -> None:
        hidden = student.model(input_ids=ids[:1], use_cache=False).last_hidden_state
        linear_topk_kl_loss(hidden.flatten(0, 1), student.lm_head.weight, probs, teacher).backward()
        optimizer.step()
        optimizer.zero_grad()

    for again in range(3):
        _timed("distillation step", step, tokens=PROMPT, kept=KEPT, again=again)


def run() -> int:
    begin = time.monotonic()
    dense = random_llama()
    synchronize()
    count = sum(parameter.numel() for parameter in dense.parameters())
    say(step="model", op="made", parameters=count, seconds=round(time.monotonic() - begin, 1))
    failed = 0
    for part in (speed, training):
        try:
            part(dense)
        except Exception as error:
            failed += 1
            say(step="failed", call=part.__name__, error=failure(error))
    return failed
