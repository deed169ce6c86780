"""What a model writes itself: from its own distribution, kept, and the same however many processes share it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling import writing
from linearpatch_kernels.modeling.writing import written_documents
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.text import token_windows
from tests.support.tiny import tiny_model, tiny_tokenizer

LENGTH = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(writing, "_BATCH", 6)
    return tmp_path / "cache" / "written"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> PreTrainedModel:
    model = tiny_model("llama", layers=2, vocab_size=len(tokenizer))
    # Sharp enough that what was drawn tells which model drew it.
    model.lm_head.weight.data.mul_(20)
    return model


def test_there_is_enough_of_it_and_it_is_the_models_own(model: PreTrainedModel, tokenizer: Any) -> None:
    state = torch.random.get_rng_state()
    documents = written_documents(model, tokenizer, 300, LENGTH)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert token_windows(tokenizer, documents, length=LENGTH).numel() >= 300
    assert len(set(documents)) > len(documents) // 2
    # The likelihood of what follows the first token is far above that of as many tokens at random.
    ids = torch.tensor([row[:6] for one in documents if len(row := tokenizer(one)["input_ids"]) >= 6])
    random = torch.randint(len(tokenizer), ids.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [float(model(one, labels=one).loss) for one in (ids, random)]
    assert losses[0] < losses[1] - 1


def test_what_was_written_is_kept(
    model: PreTrainedModel, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = written_documents(model, tokenizer, 150, LENGTH)
    files = sorted(cache.iterdir())
    assert len(files) > 1
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_written", lambda *_: pytest.fail("it was written again"))
        assert written_documents(model, tokenizer, 150, LENGTH) == documents
    # Damaged, of another kind or not there: written again, the same.
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"\x01")
    files[-1].unlink()
    assert written_documents(model, tokenizer, 150, LENGTH) == documents
    # More is what there was, and more.
    more = written_documents(model, tokenizer, 400, LENGTH)
    assert more[: len(documents)] == documents
    # A model with other weights writes its own.
    other = tiny_model("llama", layers=2, vocab_size=len(tokenizer), seed=1)
    assert written_documents(other, tokenizer, 150, LENGTH) != documents


def test_a_file_of_somebody_elses_stays(model: PreTrainedModel, tokenizer: Any, cache: Path) -> None:
    written_documents(model, tokenizer, 10, LENGTH)
    (file,) = cache.iterdir()
    file.write_bytes(b"notes")
    with pytest.raises(InputError, match="not a file of linearpatch"):
        written_documents(model, tokenizer, 10, LENGTH)
    assert file.read_bytes() == b"notes"


def test_processes_share_it(model: PreTrainedModel, tokenizer: Any, cache: Path) -> None:
    alone = written_documents(model, tokenizer, 150, LENGTH)
    batches = [writing._written(model, tokenizer, [], LENGTH, batch) for batch in range(6)]
    rounds = itertools.count()

    def exchange(mine: Any) -> list[Any]:
        begin = 2 * next(rounds)
        assert torch.equal(mine, batches[begin + 1])
        return batches[begin : begin + 2]

    for file in cache.iterdir():
        file.unlink()
    shared = written_documents(model, tokenizer, 150, LENGTH, processes=Processes(rank=1, count=2, exchange=exchange))
    assert shared == alone


def test_a_text_ends_where_the_model_ends_it(model: PreTrainedModel, tokenizer: Any) -> None:
    ends = model.generation_config.eos_token_id
    try:
        # Half of the vocabulary ends a text, so nearly every document is short.
        model.generation_config.eos_token_id = list(range(len(tokenizer) // 2))
        rows = writing._written(model, tokenizer, [], LENGTH, 0)
    finally:
        model.generation_config.eos_token_id = ends
    assert int((rows >= 0).sum()) < rows.numel() // 2
    # Behind an end nothing counts.
    assert bool(((rows >= 0).long().diff(dim=1) <= 0).all())


def test_what_cannot_be_written(model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="`length` must be at least"):
        written_documents(model, tokenizer, 10, 1)
    monkeypatch.setattr(writing, "_written", lambda *_: torch.full((6, LENGTH), -1))
    with pytest.raises(InputError, match="writes nothing"):
        written_documents(model, tokenizer, 10, LENGTH)
