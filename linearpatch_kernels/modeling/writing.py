"""Text that a model writes itself, for a calibration without any other text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import left_by_us, read_seal, reading, write_sealed
from linearpatch_kernels.fingerprints import fingerprint_model, fingerprint_tokenizer
from linearpatch_kernels.modeling.families import text_config
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.text import cache_dir, leading_tokens
from linearpatch_kernels.torch_state import evaluation_mode, own_state

# Documents that are written at once, and kept at once.
_BATCH = 32
_CURE = "it is written again"
_FORMAT = "linearpatch-written-1"


@own_state()
@torch.no_grad()
def written_documents(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: int,
    length: int,
    *,
    processes: Processes | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Documents that together have at least so many tokens, drawn from the model's own distribution.

    Each begins with what the tokenizer puts in front of a text and one token drawn from the whole vocabulary, and goes
    on with samples at temperature 1 up to an end of text, or to ``length`` tokens. Same model, same documents; they are
    kept under `text.cache_dir`, 32 at a time, and a run that was killed goes on from there.

    Args:
        model: a causal LM; not changed.
        tokens: how many are needed of all documents together, what stands in front not counted.
        length: of a document, in tokens, at the most.
        processes: those that share the work.

    Raises:
        InputError: a length that leaves nothing to write, or a model that writes nothing.

    Source: self-calibration, arXiv 2410.17170; the first token as in LLM-QAT, arXiv 2305.17888.
    """
    front, processes = leading_tokens(tokenizer), processes or Processes()
    if length < len(front) + 2:
        raise InputError(
            f"a document of {length} tokens leaves none to write: `length` must be at least {len(front) + 2}"
        )
    place = cache_dir() / "written"
    name = f"{fingerprint_model(model)[:16]}-{fingerprint_tokenizer(tokenizer)}-{length}"
    documents: list[str] = []
    has = 0
    with evaluation_mode(model):
        for batch in _batches(processes):
            file = place / f"{name}-{batch}.safetensors"
            mine = _kept(file)
            if mine is None:
                mine = _written(model, tokenizer, front, length, batch)
                with contextlib.suppress(InputError, OSError):
                    # Where there is no room for it, it is written again the next time.
                    place.mkdir(parents=True, exist_ok=True)
                    write_sealed(file, {"ids": mine}, {"format": _FORMAT})
            for rows in processes.gather(mine):
                if has < tokens:
                    fresh = [row[row >= 0] for row in rows]
                    has += sum(len(row) for row in fresh)
                    documents += tokenizer.batch_decode(fresh, skip_special_tokens=True)
            if progress is not None:
                progress("the model writes", min(has, tokens), tokens)
            if has >= tokens:
                return documents
            if not has:
                raise InputError("the model writes nothing: give it a text to calibrate on")
    raise AssertionError("batches have no end")


def _kept(file: Path) -> Tensor | None:
    """The batch that an earlier run wrote, if it can be read."""
    if not left_by_us(file):
        return None
    try:
        with reading(file, _CURE):
            if read_seal(file, _CURE)[0].get("format") != _FORMAT:
                return None
            return load_file(file)["ids"]
    except InputError:
        return None


def _written(model: PreTrainedModel, tokenizer: Any, front: list[int], length: int, batch: int) -> Tensor:
    """Token ids [B, T] behind what stands in front; -1 behind the end of a text."""
    device = model.get_input_embeddings().weight.device
    special = set(tokenizer.all_special_ids)
    ids_known = range(min(len(tokenizer), text_config(model.config).vocab_size))
    words = torch.tensor([one for one in ids_known if one not in special], dtype=torch.long)
    settings = model.generation_config
    ends = {one for one in [*_listed(settings.eos_token_id), *_listed(tokenizer.eos_token_id)] if one is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # What is left out here, the model's own settings decide.
        repetition_penalty=1.0,
        max_length=length,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(batch)
        first = words[torch.randint(len(words), (_BATCH, 1))]
        begun = torch.cat([torch.tensor(front, dtype=torch.long).expand(_BATCH, -1), first], dim=1).to(device)
        ids = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=sampling)
    ids = ids[:, len(front) :].cpu()
    ended = torch.isin(ids, torch.tensor(sorted(ends), dtype=ids.dtype))
    return ids.masked_fill(ended.cumsum(dim=1) > 0, -1)


def _listed(one: Any) -> list[Any]:
    return list(one) if isinstance(one, (list, tuple)) else [one]


def _batches(processes: Processes) -> Iterator[int]:
    """The batches of this process, one a round: the first ones that suffice are the same, however many share them."""
    batch = processes.rank
    while True:
        yield batch
        batch += processes.count
