"""What a model of Transformers writes and expects, which an engine is held against."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Expected(NamedTuple):
    """What is written [W, N]; and, per sequence and position but the first, [W, T - 1]: the log-probability of what is
    there, the best token, and by how much it is better than the second."""

    written: Tensor
    logprobs: Tensor
    best: Tensor
    gaps: Tensor


def continued(model: PreTrainedModel, prompts: Tensor, count: int, **options: Any) -> Tensor:
    """Prompts [W, T] with the ``count`` tokens that the model writes after them, each the best."""
    generate: Any = model.generate
    found: Tensor = generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
        **options,
    )
    return found


@torch.no_grad()
def expected_of(model: PreTrainedModel, prompts: Tensor, count: int) -> tuple[Tensor, Expected]:
    """The sequences to force, which are the prompts with ``count`` tokens after them, and what is expected of them."""
    sequences = continued(model, prompts, count)
    logprobs = model(sequences).logits.double().log_softmax(dim=-1)[:, :-1]
    first, second = logprobs.topk(2).values.unbind(dim=-1)
    tokens = logprobs.gather(-1, sequences[:, 1:, None]).squeeze(-1)
    written = sequences[:, prompts.shape[1] :]
    return sequences, Expected(written, tokens, logprobs.argmax(dim=-1), first - second)
