"""What others do with an output: load it without this package, generate, export it, save it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.nn import DensePatch, HadamardPatch, LowRankPatch, NormLinearPatch
from tests.support.field import IDS, SMALL, cut, isolated, linearpatch, logits, same, save_model, text_file, tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")


def near_identity(seed: int = 0) -> DensePatch:
    patch = DensePatch(48)
    torch.manual_seed(seed)
    with torch.no_grad():
        patch.weight += 0.1 * torch.randn(48, 48)
    return patch


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny(), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def pruned(dense: Path, text: Path) -> Path:
    place = dense.with_name("pruned")
    flags = ["--spans", "2:4", "--fit", "linearpatch", "--text", text, *SMALL]
    assert linearpatch("prune", dense, "-o", place, *flags) is None
    return place


# --- where the package is not installed ------------------------------------------------------------------------------

_SAME_NAME = {
    "llama": "LinearPatchLlamaForCausalLM",
    "qwen3": "LinearPatchQwen3ForCausalLM",
    "gemma3_text": "LinearPatchGemma3ForCausalLM",
    "phi3": "LinearPatchPhi3ForCausalLM",
}
_FROM = (".", "./1.5 [b] out.d", "link", "../link/", "1.5 [b] out.d/../link")

_ALONE = """
import json, os
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, pruned = sys.argv[1:3]

def held_against(model, file):
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None]).logits
    return "same" if torch.allclose(logits, load_file(file)["logits"], atol=1e-4) else "other logits"

def told(work):
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def of_one_name():
    # All of them are loaded before the first is used.
    places = [os.path.join(folder, family, "pruned model v1.5-ü") for family in json.loads(sys.argv[3])]
    models = [AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval() for place in places]
    return [
        [type(model).__name__, held_against(model, os.path.join(place, "..", "expected.safetensors"))]
        for place, model in zip(places, models)
    ]

def from_here(where):
    os.chdir(os.path.join(folder, "here", "1.5 [b] out.d" if where in (".", "../link/") else ""))
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True).eval()
    return held_against(model, os.path.join(folder, "here", "expected.safetensors"))

def by_lm_eval():
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=pruned, trust_remote_code=True, device="cpu", batch_size=2)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([("5 6 7", " 8 9"), ("1 2", " 3")])]
    return [type(lm.model).__name__, [one[0] for one in lm.loglikelihood(requests, disable_tqdm=True)]]

found = {"one name": told(of_one_name), "lm-eval": told(by_lm_eval)}
found |= {where: told(lambda: from_here(where)) for where in json.loads(sys.argv[4])}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pruned: Path) -> dict[str, Any]:
    """What one process without the package says of outputs in many places."""
    folder = tmp_path_factory.mktemp("alone")
    for i, family in enumerate(_SAME_NAME):
        _save_with_logits(cut(tiny(family, seed=i), {2: near_identity(i)}), folder / family / "pruned model v1.5-ü")
    place = folder / "here" / "1.5 [b] out.d"
    _save_with_logits(cut(tiny(seed=9), {2: near_identity(9)}), place)
    (folder / "here" / "link").symlink_to(place)
    given = [folder, pruned, json.dumps(list(_SAME_NAME)), json.dumps(_FROM)]
    said = isolated(_ALONE, *given, env={"HF_MODULES_CACHE": str(folder / "modules")})
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def _save_with_logits(model: PreTrainedModel, place: Path) -> None:
    place.parent.mkdir(parents=True)
    model.save_pretrained(place)
    save_file({"logits": logits(model).contiguous()}, place.parent / "expected.safetensors")


@pytest.mark.slow
def test_outputs_in_directories_of_one_name(alone: dict[str, Any]) -> None:
    """Two checkpoints with code of their own, whose directories have the same name, got each other's classes:
    transformers #45632."""
    assert alone["one name"] == [[name, "same"] for name in _SAME_NAME.values()]


@pytest.mark.slow
@pytest.mark.parametrize("where", _FROM)
def test_an_output_loaded_from_here(alone: dict[str, Any], where: str) -> None:
    """As the working directory, by a relative path with dots and brackets in it, through a link: transformers
    #29251."""
    assert alone[where] == "same"


@pytest.mark.slow
def test_lm_eval_reads_the_output_by_itself(alone: dict[str, Any], pruned: Path) -> None:
    """lm-eval's own loader with ``trust_remote_code``: the log-likelihoods that our loader's model gives."""
    model, tokenizer = load_model(pruned, device="cpu")
    wanted = []
    for context, continuation in (("5 6 7", " 8 9"), ("1 2", " 3")):
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        logp = logits(model, ids).log_softmax(-1)[0, start - 1 : -1]
        wanted.append(float(logp.gather(1, ids[0, start:, None]).sum()))
    assert alone["lm-eval"] == ["LinearPatchLlamaForCausalLM", pytest.approx(wanted, abs=1e-3)]


# --- generation ------------------------------------------------------------------------------------------------------

_ASSISTED: dict[str, Callable[[PreTrainedModel, PreTrainedModel], tuple[PreTrainedModel, dict[str, Any]]]] = {
    "as the dense model's draft": lambda dense, pruned: (dense, {"assistant_model": pruned}),
    "with itself as draft": lambda _, pruned: (pruned, {"assistant_model": pruned}),
    "with the dense model as draft": lambda dense, pruned: (pruned, {"assistant_model": dense}),
    "prompt lookup": lambda _, pruned: (pruned, {"prompt_lookup_num_tokens": 3}),
    "static cache": lambda _, pruned: (pruned, {"cache_implementation": "static"}),
    "no cache": lambda _, pruned: (pruned, {"use_cache": False}),
}


def _before(version: str, *wanted: int) -> bool:
    return tuple(map(int, version.split(".")[:2])) < wanted


def _written(model: PreTrainedModel, prompt: Tensor, **more: Any) -> Tensor:
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "eos_token_id": None} | more
    found: Tensor = model.generate(prompt, do_sample=False, **options)
    return found


@pytest.mark.parametrize("way", _ASSISTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_generate_that_the_dense_model_knows(family: str, way: str) -> None:
    """The pruned model as a draft and with one: mlx-examples #1155, vllm #24506. Every way gives the greedy tokens of
    the model that is asked, as it does with the dense model in the pruned one's place. (Transformers 5.17 stops with
    two of the dense model where a layer has a sliding window; 5.23 does not.)"""
    dense = tiny(family)
    pruned = cut(dense, {2: HadamardPatch(48, 2), 4: LowRankPatch(48, 2)})
    prompt = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(0))
    if _before(transformers.__version__, 5, 23):
        model, options = _ASSISTED[way](dense, dense)
        try:
            _written(model, prompt, **options)
        except RuntimeError as error:
            pytest.skip(f"Transformers {transformers.__version__} does not do it with the dense model: {error}")
    for other in (dense, pruned):
        model, options = _ASSISTED[way](dense, other)
        assert torch.equal(_written(model, prompt, **options), _written(model, prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_padded_prompts(family: str) -> None:
    """Two beams with the cache and without it; two prompts of different lengths, padded on the left, and each alone."""
    pruned = cut(tiny(family), {2: near_identity()})
    short, long = (torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (4, 7))
    beams = [_written(pruned, long, num_beams=2, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*beams)
    padding = torch.zeros(1, 3, dtype=torch.long)
    both = torch.cat([torch.cat([padding, short], 1), long])
    found = _written(pruned, both, attention_mask=(both != 0).long(), max_new_tokens=6)
    for row, prompt in zip(found, (short, long), strict=True):
        assert torch.equal(row[7:], _written(pruned, prompt, max_new_tokens=6)[0, prompt.shape[1] :])


# --- export ----------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def _exported(module: nn.Module, ids: Tensor) -> Any:
    length = torch.export.Dim("t", min=2, max=64)
    return torch.export.export(module, (ids,), dynamic_shapes={"ids": {1: length}}).module()


EXPORTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.export": _exported,
    "trace": lambda module, ids: torch.jit.trace(module, (ids,), check_trace=False),
    "compile": lambda module, _: torch.compile(module, backend="aot_eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", EXPORTS)
def test_a_patched_model_is_exported_as_a_stock_one(how: str) -> None:
    """torch.export with a dynamic length, trace, and a graph without breaks, with a patch of every kind. (Gradients by
    ``torch.func`` cannot pass any operator of torch.library in 2.13.)"""
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(0))
    if _before(torch.__version__, 2, 13):
        try:
            EXPORTS[how](Logits(tiny(layers=4)), ids)
        except torch._dynamo.exc.UserError as error:
            pytest.skip(f"torch {torch.__version__} does not export the stock model: {str(error).splitlines()[0]}")
    patches = {0: NormLinearPatch(48), 1: HadamardPatch(48, 2), 2: LowRankPatch(48, 2), 3: near_identity()}
    module = Logits(patched_model(keep_layers(tiny(layers=4), [0, 1, 3]), patches))
    with torch.no_grad():
        exported = EXPORTS[how](module, ids)
        assert same(exported(ids), module(ids))
        if how == "torch.export":
            assert same(exported(ids[:, :7]), module(ids[:, :7]))


# --- files -----------------------------------------------------------------------------------------------------------


def _keys(file: Path) -> set[str]:
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


@pytest.mark.parametrize("how", ["prune", "merge", "merge and distill"])
def test_a_stock_output_holds_no_tensors_but_the_models(how: str, dense: Path, text: Path, tmp_path: Path) -> None:
    """Engines read every ``*.safetensors`` of a directory, and fail on what the model does not have: vllm #4989,
    #40765."""
    flags = ["--text", text, "--length", 16, "--device", "cpu"]
    out = tmp_path / "out"
    if how == "prune":
        cutting = ["--drop", 2, "--fit", "none", "--samples", 6]
        assert linearpatch("prune", dense, "-o", out, *cutting, *flags) is None
    else:
        merged = out if how == "merge" else tmp_path / "merged"
        assert linearpatch("merge", dense, "--layers", 4, "-o", merged, "--samples", 4, *flags) is None
    if how == "merge and distill":
        training = ["--teacher", dense, "--steps", 2, "--heldout", 2]
        assert linearpatch("distill", merged, "-o", out, *training, *flags) is None
    model, _ = load_model(out, device="cpu")
    own = _keys(out / "model.safetensors")
    assert own == set(model.state_dict())
    for file in out.rglob("*.safetensors"):
        assert _keys(file) <= own, file


@pytest.fixture(scope="module")
def tied(dense: Path, text: Path) -> Path:
    """A pruned model whose head is its embedding."""
    source = save_model(tiny(tie_word_embeddings=True), dense.with_name("tied"))
    place = source.with_name("tied-pruned")
    flags = ["--spans", "2:4", "--fit", "low-rank", "--text", text, *SMALL]
    assert linearpatch("prune", source, "-o", place, *flags) is None
    return place


def _in_shards(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    return {"max_shard_size": "20KB"}


def _with_another_token(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    model.resize_token_embeddings(len(tokenizer))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return {}


@pytest.mark.parametrize("change", [_in_shards, _with_another_token], ids=["in shards", "with another token"])
def test_an_output_saved_again_is_one_for_every_command(
    change: Callable[[PreTrainedModel, Any], dict[str, Any]], tied: Path, text: Path, tmp_path: Path
) -> None:
    """Transformers writes it in shards, or with more tokens; then ours inspect, evaluate and cut it."""
    model, tokenizer = load_model(tied, device="cpu")
    wanted = logits(model)
    place = tmp_path / "again"
    model.save_pretrained(place, **change(model, tokenizer))
    tokenizer.save_pretrained(place)
    again, _ = load_model(place, device="cpu")
    assert same(logits(again)[..., :97], wanted)
    assert linearpatch("inspect", place) is None
    evaluation = ["--text", text, "--windows", 2, "--length", 16, "--device", "cpu"]
    assert linearpatch("evaluate", place, *evaluation) is None
    flags = ["--drop", 1, "--fit", "linearpatch", "--text", text, *SMALL]
    assert linearpatch("prune", place, "-o", tmp_path / "cut", *flags) is None
    assert load_model(tmp_path / "cut", device="cpu")[0].config.num_hidden_layers == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_output_saved_again_in_another_dtype(dtype: torch.dtype, tied: Path, tmp_path: Path) -> None:
    """As above; the patch takes part."""
    model, tokenizer = load_model(tied, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path, device="cpu")
    assert again.dtype == dtype
    weights = again.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    # Not to the bit: sums are rounded in an order that depends on where in the mapped file a weight begins.
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS))
