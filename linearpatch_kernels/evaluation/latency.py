"""How fast a causal language model reads a prompt and writes tokens, and how large it is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import Progress, model_device
from linearpatch_kernels.modeling.families import text_config
from linearpatch_kernels.torch_state import eval_mode


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats, tokens of all sequences of the batch together.

    Attributes:
        prefill_tokens_per_second: prompt tokens / time of the forward pass that fills the key/value cache.
        decode_tokens_per_second: new tokens / time of the cached one-token passes after it.
        prompt_tokens, new_tokens, batch_size, repeats: what was run.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelSize:
    """Numbers in all parameters, tied ones once, and the bytes they take in their present dtypes."""

    parameters: int
    bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Count a model's parameters; a tensor used in two places (tied embeddings) counts once."""
    parameters = list(model.parameters())
    return ModelSize(sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))


def compare_speed(
    models: Mapping[str, nn.Module],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Prefill and decode speed of Transformers causal language models by greedy generation with the cache.

    Each repeat runs every model once, one after the other, so that a machine that slows down or speeds up meanwhile
    does so for all of them; before the first repeat each model runs once unmeasured. The prompt is random token ids,
    the same for all models (it is not read from a text, since speed does not depend on it); as in generation, the
    prompt's logits are computed for its last position only.

    Raises:
        InputError: fewer than 1 token, repeat or sequence, or a prompt longer than the model's context.
    """
    if min(prompt_tokens, new_tokens, repeats, batch_size) < 1:
        raise InputError("prompt tokens, new tokens, repeats and batch size must each be at least 1")
    configs: list[Any] = [text_config(model.config) for model in models.values()]
    vocabulary = min(config.vocab_size for config in configs)
    context = min(getattr(config, "max_position_embeddings", math.inf) for config in configs)
    if prompt_tokens + new_tokens > context:
        raise InputError(f"{prompt_tokens} + {new_tokens} tokens exceed the model's {context} positions: ask for fewer")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator, device="cpu")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with eval_mode(*models.values()):  # as somebody's process has it, whose products are torch's choice
        for repeat in range(repeats + 1):
            for name, model in models.items():
                measured = _generation_seconds(model, prompt, new_tokens)
                if repeat > 0:
                    seconds[name].append(measured)
            if progress:
                progress("measuring speed", repeat, repeats)
    return {
        name: Speed(
            prefill_tokens_per_second=batch_size * prompt_tokens / statistics.median(s[0] for s in times),
            decode_tokens_per_second=batch_size * new_tokens / statistics.median(s[1] for s in times),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            repeats=repeats,
        )
        for name, times in seconds.items()
    }


def _generation_seconds(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    device = model_device(model)
    ids = prompt.to(device)
    with torch.no_grad():
        start = _now(device)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefilled = _now(device)
        for _ in range(new_tokens):
            ids = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        return prefilled - start, _now(device) - prefilled


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
