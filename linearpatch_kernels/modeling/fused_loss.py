"""A causal LM that computes the Top-K distillation loss in place of its logits, for a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import PATCHED_PREFIX, STOCK_FAMILIES, logits_options
from linearpatch_kernels.nn import LinearTopKKLLoss


def fuse_distillation_loss(
    model: PreTrainedModel, *, normalization: str = "topk", temperature: float = 1.0
) -> Callable[[], None]:
    """Let ``model(..., teacher_probs=, teacher_ids=)`` return `linear_topk_kl_loss` of its last hidden states.

    Called with ``teacher_probs`` and ``teacher_ids`` [batch, tokens, K], where the slots at position t are those of the
    teacher's logits at position t, the model returns an output that has a ``loss`` and no logits: the head's matrix
    product with all of the vocabulary never happens. Without them it is called as before. Equivalent to::

        logits = model(...).logits
        topk_kl_loss(logits.flatten(0, 1), teacher_probs.flatten(0, 1), teacher_ids.flatten(0, 1), ...)

    A factor on the logits (Granite's ``logits_scaling``, Cohere's ``logit_scale``) becomes a part of the temperature; a
    soft-cap (``final_logit_softcapping``, Gemma 2) is that of `linear_topk_kl_loss`.
    ``transformers.Trainer`` needs nothing else::

        fuse_distillation_loss(model)
        Trainer(model, TrainingArguments(..., remove_unused_columns=False), train_dataset=windows).train()

    with ``windows`` a data set of dicts with ``input_ids``, ``teacher_probs`` and ``teacher_ids``. The loss is a mean
    over the tokens of a micro-batch, and the trainer's over gradient accumulation is the mean of those.

    Args:
        model: a causal LM of Transformers with a plain ``nn.Linear`` as its head, tied or not, on any device.
        normalization, temperature: as in `topk_kl_loss`.

    Returns:
        A function that takes it back.

    Raises:
        InputError: the head is no ``nn.Linear``, or the logits are more than its output times a factor or soft-capped.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise InputError(f"a head of type {type(head).__name__} cannot be fused: it must be a plain nn.Linear")
    factor, softcap = _logits_options(model, head)
    loss_of = LinearTopKKLLoss(normalization, temperature / factor, softcap)
    stock, before = model.forward, vars(model).copy()

    def forward(
        *args: Any, teacher_probs: Tensor | None = None, teacher_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if teacher_probs is None or teacher_ids is None:
            return stock(*args, **kwargs)
        hidden = model.get_decoder()(*args, **kwargs).last_hidden_state
        if teacher_ids.shape[:-1] != hidden.shape[:-1]:
            tokens, slots = list(hidden.shape[:-1]), list(teacher_ids.shape)
            raise InputError(f"teacher_ids must be {[*tokens, 'K']} as the model's tokens, not {slots}")
        flat = (tensor.flatten(0, 1) for tensor in (teacher_probs, teacher_ids))
        return CausalLMOutput(loss=loss_of(hidden.flatten(0, 1), head.weight, *flat, head.bias))

    def undo() -> None:
        for name in ("forward", "accepts_loss_kwargs"):
            if name in before:
                setattr(model, name, before[name])
            else:
                vars(model).pop(name, None)

    model.forward = forward
    # Else the trainer takes the loss for a sum over what it counted itself.
    model.accepts_loss_kwargs = False
    return undo


def _logits_options(model: PreTrainedModel, head: nn.Linear) -> tuple[float, float | None]:
    """By what the model multiplies its head's output, soft-capped first: of the config, and checked on two tokens."""
    config = model.config.get_text_config()
    # Models of no family of ours are fused, too.
    family = STOCK_FAMILIES.get(config.model_type.removeprefix(PATCHED_PREFIX))
    factor, softcap = (logits_options if family is None else family.logits_options)(config)
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, args, output: seen.extend((args[0], output)))
    ids = torch.tensor([[0, config.vocab_size - 1]], dtype=torch.int64, device=head.weight.device)
    mode = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        model.train(mode)
        handle.remove()
    rounding = 8 * torch.finfo(logits.dtype).eps
    expected = seen[1] * factor if softcap is None else (seen[1] / softcap).tanh() * softcap * factor
    if not (_alike(seen[0], hidden, rounding) and _alike(logits, expected, rounding)):
        raise InputError(
            f"{type(model).__name__} does something to its logits that no known option of its config explains:"
            " use topk_kl_loss on them"
        )
    return factor, softcap


def _alike(one: Tensor, other: Tensor, rounding: float) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= rounding * other.abs().max())
