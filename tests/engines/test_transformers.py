"""What people run in Transformers, on a stock and on a patched result that the command wrote."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    TorchAoConfig,
    pipeline,
)

import linearpatch_kernels.modeling  # noqa: F401  # registers the patched classes, as a person does
from tests.support.field import IDS, SMALL, isolated, linearpatch, logits, same, save_model, text_file, tiny
from tests.support.pages import python_of
from tests.support.tiny import tiny_tokenizer

KINDS = {"stock": ("--heal", "refit"), "patched": ("--heal", "patch", "--fit", "hadamard-low-rank")}
# torchao's groups of 32 weights need widths that 32 divides.
WIDTHS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
CHAT = "{% for m in messages %}1 {{ m['content'] }} 2 {% endfor %}{% if add_generation_prompt %}3{% endif %}"
MESSAGES = [
    {"role": "user", "content": "5 6 7"},
    {"role": "assistant", "content": "8"},
    {"role": "user", "content": "9"},
]
PROMPT = "5 6 7 8"
# The generation crosses Gemma's sliding window of 8 tokens.
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The directory that ``linearpatch prune`` wrote of a family's tiny model, healed in this way."""
    folder = tmp_path_factory.mktemp("results")
    text = text_file(folder)

    @functools.cache
    def dense(family: str) -> Path:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHAT
        return save_model(tiny(family, **WIDTHS), folder / family, tokenizer)

    @functools.cache
    def result(family: str, kind: str) -> Path:
        place = folder / f"{family}-{kind}"
        flags = ["--spans", "2:4", *KINDS[kind], "--text", text, *SMALL]
        assert linearpatch("prune", dense(family), "-o", place, *flags) is None
        return place

    return result


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["llama", "gemma3_text"])
def of_two_families(request: pytest.FixtureRequest, results: Callable[[str, str], Path], kind: str) -> Path:
    return results(request.param, kind)


@pytest.fixture
def llama(results: Callable[[str, str], Path], kind: str) -> Path:
    return results("llama", kind)


def loaded(place: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, **options).eval()
    assert type(model).__name__.startswith("LinearPatch") == ("patched" in place.name)
    return model


def argmax_tokens(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The greedy tokens without `generate` and without a cache: a whole forward pass for each."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def generated(model: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None} | options
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return found[0, len(prompt) :].tolist()


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_greedy_tokens_with_a_cache(of_two_families: Path, cache: str | None) -> None:
    model = loaded(of_two_families)
    prompt = [5, 6, 7, 8]
    assert generated(model, prompt, cache_implementation=cache) == argmax_tokens(model, prompt)


@pytest.mark.slow
def test_greedy_tokens_of_a_compiled_model_with_a_static_cache(llama: Path) -> None:
    """One graph without a break, by inductor."""
    model = loaded(llama)
    prompt = [5, 6, 7, 8]
    wanted = argmax_tokens(model, prompt)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert generated(model, prompt, cache_implementation="static") == wanted


def test_continuous_batching_gives_each_prompt_its_own_tokens(of_two_families: Path) -> None:
    """The cache is bounded here: left to itself, it takes six tenths of the free memory on a CPU."""
    model = loaded(of_two_families)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [3]]
    wanted = [argmax_tokens(model, prompt) for prompt in prompts]
    found = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in found.values()] == wanted


# --- pipelines -------------------------------------------------------------------------------------------------------


def answers(place: Path) -> list[str]:
    """What the result writes behind a prompt and as the next turn of a chat, by the argmax loop."""
    model, tokenizer = loaded(place), AutoTokenizer.from_pretrained(place)
    prompts = [
        tokenizer(PROMPT)["input_ids"],
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"],
    ]
    found = []
    for prompt in prompts:
        tokens = argmax_tokens(model, prompt)
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else None
        found.append(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return found


def test_a_text_pipeline_and_a_chat(of_two_families: Path) -> None:
    """The chat's template is the dense model's: `prune` carries it over."""
    ask = pipeline("text-generation", model=str(of_two_families), device="cpu")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    text = ask(PROMPT, return_full_text=False, **options)[0]["generated_text"]
    chat = ask(MESSAGES, **options)[0]["generated_text"]
    assert chat[:-1] == MESSAGES
    assert [text, chat[-1]["content"]] == answers(of_two_families)


# --- adapters and quantised weights ----------------------------------------------------------------------------------


def test_an_adapter_is_trained_saved_and_loaded_on_a_fresh_model(llama: Path, tmp_path: Path) -> None:
    """Training changes nothing but the adapter: neither the patch nor any other weight of the result.
    (tests/field/test_training.py has more kinds of adapters, on patched results.)"""
    before = {name: weight.clone() for name, weight in loaded(llama).state_dict().items()}
    settings = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(loaded(llama), settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # An adapter's B is zero at first, so its A gets no gradient before the second step.
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(llama), tmp_path / "adapter").eval()
    assert same(logits(again), trained)
    assert not same(trained, logits(loaded(llama)), 1e-2)
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def int8(quantization: Any) -> Any:
    return quantization.Int8WeightOnlyConfig(version=2)


with_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="`make slow` runs it apart, with torchao"
)


def int4(quantization: Any) -> Any:
    """In groups of 32. Version 0.18's ``Int4WeightOnlyConfig`` has no format for a CPU."""
    granularity = quantization.PerGroup(32)
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)


@pytest.mark.slow
@with_torchao
@pytest.mark.parametrize(("config", "levels"), [(int8, 2**8), (int4, 2**4)], ids=["int8", "int4"])
def test_torchao_quantises_the_layers_and_leaves_the_patch(
    llama: Path, config: Callable[[Any], Any], levels: int, tmp_path: Path
) -> None:
    """The quantised model is the one that computes with the rounded weights, also when saved and loaded again."""
    from torchao import quantization

    whole = loaded(llama)
    model = loaded(llama, quantization_config=TorchAoConfig(config(quantization)))
    rounded = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight.dequantize()
            own = whole.get_submodule(name).weight
            # Half a step of the widest row or group, whose values span -levels/2 ... levels/2.
            assert 0 < (weight - own).abs().max() <= 1.01 * own.abs().max() / (levels - 2)
            own.data = weight
            rounded.append(name)
    layers = whole.config.num_hidden_layers
    assert len(rounded) == 7 * layers
    for name, parameter in whole.named_parameters():
        if name.removesuffix(".weight") not in rounded:
            assert torch.equal(parameter, model.get_parameter(name)), name
    wanted = logits(whole)
    assert same(logits(model), wanted)
    model.save_pretrained(tmp_path / "quantised")
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")), wanted)


@pytest.mark.slow
@with_torchao
def test_the_python_of_the_page_runs_where_torchao_is(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "DIR").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python_of("engines/transformers.md"), names)
    written, batched = capsys.readouterr().out.splitlines()[-2:]
    assert written.endswith(ast.literal_eval(batched)[0])
    assert type(names["adapted"].get_base_model()) is type(names["quantised"]) is type(names["chat"].model)


# --- where the package is not installed ------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "5 6 7", "answers": ["8", "9 10"], "right": 0},
    {"question": "20 3", "answers": ["4", "1", "30 31"], "right": 2},
]
TASK = """
task: numbers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
"""
ALONE = """
import json
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import pipeline
tasks, prompt, messages, length, *places = sys.argv[1:]
options = dict(max_new_tokens=int(length), do_sample=False)
for place in places:
    ask = pipeline("text-generation", model=place, trust_remote_code=True, device="cpu")
    text = ask(prompt, return_full_text=False, **options)[0]["generated_text"]
    chat = ask(json.loads(messages), **options)[0]["generated_text"][-1]["content"]
    found = simple_evaluate(
        model="hf", model_args=f"pretrained={place},trust_remote_code=True,dtype=float32", device="cpu", batch_size=2,
        tasks=["numbers"], task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0,
    )
    scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in found["samples"]["numbers"]]
    accuracy = found["results"]["numbers"]["acc,none"]
    print("found", json.dumps([type(ask.model).__name__, [text, chat], scores, accuracy]))
"""


def log_likelihoods(place: Path) -> list[list[float]]:
    """Of every question's answers, by hand."""
    model, tokenizer = loaded(place), AutoTokenizer.from_pretrained(place)
    found = []
    for row in QUESTIONS:
        start = len(tokenizer(row["question"])["input_ids"])
        each = []
        for answer in row["answers"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {answer}")["input_ids"]])
            log_p = logits(model, ids).log_softmax(-1)[0, start - 1 : -1]
            each.append(float(log_p.gather(1, ids[0, start:, None]).sum()))
        found.append(each)
    return found


@pytest.mark.slow
def test_pipelines_and_lm_eval_in_a_process_without_the_package(
    results: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """By path with ``trust_remote_code``: the tokens and the log-likelihoods of the same result loaded here."""
    pytest.importorskip("lm_eval", reason="needs pip install 'linearpatch-kernels[eval]'")
    questions, tasks = tmp_path / "questions.jsonl", tmp_path / "tasks"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    tasks.mkdir()
    (tasks / "numbers.yaml").write_text(TASK.format(questions=questions))
    places = [results("llama", kind) for kind in KINDS]
    caches = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    said = isolated(ALONE, tasks, PROMPT, json.dumps(MESSAGES), NEW_TOKENS, *places, env=caches)
    found = [json.loads(line.removeprefix("found ")) for line in said.splitlines() if line.startswith("found ")]
    assert [name for name, *_ in found] == ["LlamaForCausalLM", "LinearPatchLlamaForCausalLM"]
    for place, (_, texts, scores, accuracy) in zip(places, found, strict=True):
        wanted = log_likelihoods(place)
        assert texts == answers(place)
        assert scores == [pytest.approx(row, abs=1e-3) for row in wanted]
        right = [row.index(max(row)) == question["right"] for row, question in zip(wanted, QUESTIONS, strict=True)]
        assert accuracy == sum(right) / len(right)
