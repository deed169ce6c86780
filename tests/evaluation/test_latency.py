"""What is run and counted; how long it takes is nobody's test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import compare_speed, model_size


def test_models_take_turns_and_generate_with_the_cache(student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> None:
    calls: list[tuple[str, int, int]] = []

    def record(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            calls.append((name, kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))

        return hook

    handles = [
        model.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, model in (("student", student), ("teacher", teacher))
    ]
    reports: list[tuple[str, int, int]] = []
    try:
        speeds = compare_speed(
            {"student": student, "teacher": teacher},
            prompt_tokens=9,
            new_tokens=3,
            repeats=2,
            progress=lambda *report: reports.append(report),
        )
    finally:
        for handle in handles:
            handle.remove()
    one = [(9, 0), (1, 9), (1, 10), (1, 11)]
    assert calls == [(name, *call) for _ in range(3) for name in ("student", "teacher") for call in one]
    assert reports[-1] == ("measuring speed", 2, 2)
    for speed in speeds.values():
        assert speed.prefill_tokens_per_second > 0
        assert speed.decode_tokens_per_second > 0
        assert speed.to_dict()["prompt_tokens"] == 9


def test_speed_is_the_median_of_the_measured_repeats(
    student: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills, decodes = [100.0, 2.0, 1.0, 40.0], [100.0, 8.0, 30.0, 4.0]  # the first is the warm-up
    clock = iter(t for pair in zip(prefills, decodes, strict=True) for t in (0.0, pair[0], pair[0] + pair[1]))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    speed = compare_speed({"m": student}, prompt_tokens=10, new_tokens=4, repeats=3, batch_size=2)["m"]
    assert speed.prefill_tokens_per_second == 2 * 10 / 2.0
    assert speed.decode_tokens_per_second == 2 * 4 / 8.0


def test_the_tokens_are_those_of_generate(student: LlamaForCausalLM) -> None:
    inputs: list[torch.Tensor] = []
    handle = student.register_forward_pre_hook(lambda _, a, kw: inputs.append(kw["input_ids"]), with_kwargs=True)
    try:
        compare_speed({"m": student}, prompt_tokens=6, new_tokens=5, repeats=1)
    finally:
        handle.remove()
    prompt, decoded = inputs[0], torch.cat(inputs[1:6], 1)
    generated = student.generate(
        prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    assert torch.equal(decoded, generated[:, 6:])


def test_size_counts_tied_weights_once(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    apart, tied = tiny_llama(0), tiny_llama(0, tied=True)
    assert model_size(apart).parameters - model_size(tied).parameters == 89 * 32
    assert model_size(tied).bytes == 4 * model_size(tied).parameters
    assert model_size(tied.bfloat16()).bytes == 2 * model_size(tied).parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 0}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
        ({"prompt_tokens": 60, "new_tokens": 5}, "60 \\+ 5 tokens exceed the model's 64 positions"),
    ],
)
def test_what_cannot_be_run_is_refused(student: LlamaForCausalLM, changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare_speed({"m": student}, **{"prompt_tokens": 4, "new_tokens": 2, "repeats": 1, **changes})
