"""Every decoder that Transformers has, tiny and random, cut -> ``docs/reference/models.md``: what works, and why not.

``python tools/models_reference.py`` tries them all and writes the page, in minutes, with a Python that has the package;
``python tools/models_reference.py gemma2 gpt2`` tries some and prints what came out. A test compares the page's rows
with what comes out now.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import said
from linearpatch_kernels.forward import PartialRun
from linearpatch_kernels.healing.refit import RefitSettings, refit, steps_of_cut
from linearpatch_kernels.merging.merge import Merge, check_mergeable, merge_layers
from linearpatch_kernels.modeling import keep_layers
from linearpatch_kernels.modeling.families import auto_class, decoder_layers, family_of, num_layers, text_config
from linearpatch_kernels.modeling.halves import kinds_of_halves
from linearpatch_kernels.modeling.loading import ModelSource
from linearpatch_kernels.modeling.patterns import pattern_of
from linearpatch_kernels.modeling.stream import stream_in
from linearpatch_kernels.modeling.units import sublayers
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.pruning.search import plan_pruning
from linearpatch_kernels.span import Span

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "models.md"
MADE_BY = "<!-- made by tools/models_reference.py, which tries them all: change that, not this page -->"
WORKS = "works"
IN_PART = "works, refitted in part"
PATCHED = "works, not refitted"
REMOVAL = "removal only"
NOT_TRIED = "not tried"

_LAYERS, _WIDTH, _VOCABULARY = 8, 64, 128
_GONE = Span(2, 4)
_TOKENS, _GENERATED = 20, 8
_SECONDS, _LARGEST = 60, 200_000_000
# A size by the names that configs have for it.
_SIZES: list[tuple[float, str]] = [
    (_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (_WIDTH, "hidden_size d_model n_embd embedding_size word_embed_proj_dim conv_dim lru_width"),
    (_VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (96, "intermediate_size ffn_dim n_inner d_ff block_ff_dim intermediate_size_mlp"),
    (
        4,
        "num_attention_heads n_head n_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "linear_num_value_heads",
    ),
    (
        2,
        "num_key_value_heads num_experts_per_tok moe_k moe_topk num_experts_per_token linear_num_key_heads "
        "linear_num_heads "
        "index_n_heads eos_token_id",
    ),
    (
        16,
        "head_dim kv_lora_rank v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state mamba_d_head "
        "ssm_state_size state_size mamba_head_dim attention_chunk_size index_head_dim global_head_dim "
        "query_pre_attn_scalar linear_head_dim",
    ),
    (32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank"),
    (
        8,
        "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size time_step_rank "
        "rotary_dim sliding_window attention_window_size index_topk hidden_size_per_layer_input",
    ),
    (1, "n_shared_experts n_group topk_group mamba_n_groups n_groups bos_token_id"),
    (256, "max_position_embeddings n_positions"),
    (0, "pad_token_id"),
    (0.2, "initializer_range init_std"),
]
_OFF, _ON = "tie_word_embeddings", "is_decoder"
# These make keys and values of one latent row, for every head its own.
_LATENT = (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
    *("kimi_linear", "longcat_flash", "minicpm3", "youtu"),
)
_ALTERNATING = ["sliding_attention", "full_attention"] * (_LAYERS // 2)
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * (_LAYERS // 2)}
# Halves of a head of 16 that turn with the time, the height and the width of what is seen.
_TURNING = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SEEING = (
    *("glm4v_text", "glm_ocr_text", "glmga_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl_text"),
    *("qwen2_vl_text",),
)
# Where the sizes alone give no config that the model can be made of.
_SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4, "head_dim": 8} for name in _LATENT},
    **{name: {"rope_parameters": _TURNING} for name in _SEEING},
    "bamba": {"attn_layer_indices": [1, 5], "mamba_expand": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "shared_experts_intermediate_size": 32,
        "index_topk": 64,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "layer_types": _ALTERNATING,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * _LAYERS,
    },
    "gemma4_text": {"layer_types": _ALTERNATING},
    "glm4v_moe_text": {"rope_parameters": {**_TURNING, "mrope_section": [1, 1, 2]}},
    "gpt_neo": {"attention_types": [[["global", "local"], _LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * (_LAYERS // 2)},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": {**_CONVOLUTIONS, "num_dense_layers": 2},
    "mamba2": {"num_heads": 8, "expand": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention"] * (_LAYERS // 4)
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * (_LAYERS // 2),
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **entries: Any) -> PretrainedConfig:
    """A config of eight layers, 64 wide, with ``entries``."""
    return _tiny(CONFIG_MAPPING[model_type], **entries)


def _tiny(cls: type[PretrainedConfig], **entries: Any) -> PretrainedConfig:
    """A config of a class, with those of its parts."""
    known = (
        {field.name for field in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set(inspect.signature(cls.__init__).parameters)
    )
    sizes: dict[str, Any] = {name: size for size, names in _SIZES for name in names.split()}
    sizes |= {_OFF: False, _ON: True}
    # What one name means, the class may keep under another.
    given = {cls.attribute_map.get(name, name): size for name, size in sizes.items()}
    chosen = {name: size for name, size in {**given, **sizes}.items() if name in known}
    for name, part in cls.sub_configs.items():
        # The classes of some are known once there is one.
        whole = part if part is not AutoConfig else type(getattr(cls(), name))
        if issubclass(whole, PretrainedConfig):
            chosen[name] = _tiny(whole).to_dict()
    return cls(**{**chosen, **_SPECIAL.get(cls.model_type, {}), **entries})


def tiny_decoder(model_type: str, **entries: Any) -> PreTrainedModel:
    """A random float32 causal LM, in evaluation mode, of a config with ``entries``."""
    config = tiny_config(model_type, **entries)
    if text_config(config) is not config:
        with torch.device("meta"):
            size = sum(one.numel() for one in auto_class(config).from_config(config).parameters())
        if size > _LARGEST:
            raise ValueError(f"some sizes go by names of their own: it has {size} parameters")
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        if not torch.isfinite(model(_tokens(1), use_cache=False).logits).all():
            raise ValueError("its logits are not finite")
    return model


def _tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(6, _VOCABULARY, (count, _TOKENS), generator=torch.Generator().manual_seed(seed))


@contextmanager
def bypassed(
    model: PreTrainedModel, layers: Sequence[int], patch: Callable[[Tensor], Tensor] = lambda stream: stream
) -> Iterator[None]:
    """While it is open, what enters these layers comes out of them, whatever they do; of the last one mapped."""

    def hook(_: Any, args: Any, kwargs: Any, output: Any, at: int = 0) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        stream = patch(stream) if at == layers[-1] else stream
        return stream if stream_in(output) is output else type(output)((stream, *output[1:]))

    with ExitStack() as hooks:
        for index in layers:
            bound = functools.partial(hook, at=index)
            hooks.callback(decoder_layers(model)[index].register_forward_hook(bound, with_kwargs=True).remove)
        yield


def _logits(
    model: PreTrainedModel, without: Sequence[int] = (), patch: Callable[[Tensor], Tensor] = lambda stream: stream
) -> Tensor:
    with torch.no_grad(), bypassed(model, without, patch):
        logits: Tensor = model(_tokens(2), use_cache=False).logits
    return logits


def _written(model: PreTrainedModel, *, cached: bool) -> list[int]:
    generate: Any = model.generate
    prompt = _tokens(1)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": _GENERATED}
    found = generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=cached, **options)
    return list(found[0].tolist())


def tried(model_type: str) -> str:
    """``"works"``, or where it stopped and why; `IN_PART` with what a refit leaves alone.

    A model is calibrated, layers 2 and 3 are removed, and the result must be the dense model with these bypassed by
    hooks, bit for bit; it must write the same with a cache as without; saved and loaded again it must compute the same
    (within 1e-5), and be cut again. The same with a low-rank patch at the joint. Then the weights around the joint are
    fitted again: with a ridge that allows no change the logits must stay, and with one that does, where all is fitted,
    the stream behind the last layer must come nearer to the dense model's, on the windows of the fit.
    """
    try:
        family_of(model_type)
        model = _made(model_type)
        if isinstance(model, str):
            return _refused_as_text(model_type) or f"{NOT_TRIED}: {model}"
        plain = plan_pruning(model, _tokens(2, seed=2), spans=[_GONE], fit="none").plan
        found = _cut_and_loaded(model, plan=plain)
    except InputError as error:
        return f"refused: {_line(error)}"
    if found != WORKS:
        return f"wrong: {found}"
    try:
        windows = _tokens(12, seed=2)
        patched = plan_pruning(model, windows, spans=[_GONE], fit="low-rank", rank=4, noted=lambda _: None).plan
        found = _cut_and_loaded(model, plan=patched)
    except Exception as error:
        found = _line(error)
    if found != WORKS:
        return f"{REMOVAL}: {found}"
    try:
        return _refitted(model)
    except InputError as error:
        return f"{PATCHED}: {_line(error)}"


def _refused_as_text(model_type: str) -> str | None:
    """Why a model that reads more than text cannot be cut: what its text's decoder is refused for, made alone."""
    text = text_config(CONFIG_MAPPING[model_type]()).model_type
    if text == model_type or text not in model_types():
        return None
    found = tried(text)
    return found.replace("refused: ", f"refused: its `{text}`: ") if found.startswith("refused: ") else None


def _refitted(model: PreTrainedModel) -> str:
    kinds_of_halves(model)
    kept = [layer for layer in range(_LAYERS) if layer not in range(*_GONE)]
    cut, steps = keep_layers(model, kept), steps_of_cut(kept, _LAYERS, 2, in_front=True)
    windows = _tokens(16, seed=2)
    found = {}
    for ridge in (1e12, 0.1):
        settings = RefitSettings(shrinkage=1.0, ridges=(ridge,), precision=torch.float64, on_all=True)
        found[ridge] = refit(model, cut, steps, windows[:12], windows[12:], settings=settings)
    apart = float((_logits(found[1e12].model) - _logits(cut)).abs().max() / _logits(cut).abs().max())
    if not apart < 1e-4:
        return f"wrong: a refit that may change nothing changes the logits ({apart:.1e})"
    left = dict.fromkeys(row.why for row in found[0.1].rows if row.why)
    if left:
        return f"{IN_PART}: {'; '.join(sorted(left))}"
    wanted, before, after = (_behind(one, windows) for one in (model, cut, found[0.1].model))
    return (
        WORKS if (after - wanted).norm() < (before - wanted).norm() else "wrong: a refit comes no nearer to the dense"
    )


def merged(model_type: str) -> str:
    """``"works"``, or why layers are not merged.

    Two layers are merged in the middle of a model, the second one a copy of the first: with half the units of either
    the result must be the model without the second layer.
    """
    model = tiny_decoder(model_type)
    try:
        start = next(layer for layer in range(1, _LAYERS - 1) if _pair(model, layer))
        check_mergeable(model, Span(start, start + 2))
        halves = sublayers(model)
    except StopIteration:
        return "refused: no two neighbours of the model that was tried are of one kind"
    except InputError as error:
        return f"refused: {_line(error).rpartition(' not merged: ')[2].removesuffix(' (docs/add/family.md)')}"
    layers = decoder_layers(model)
    layers[start + 1].load_state_dict(layers[start].state_dict())
    units = {half.name: (tuple(range(0, half.units, 2)), tuple(range(1, half.units, 2))) for half in halves}
    found = _logits(merge_layers(model, Merge(Span(start, start + 2), (0.5, 0.5), units)))
    wanted = _logits(keep_layers(model, [layer for layer in range(_LAYERS) if layer != start + 1]))
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return WORKS if error < 1e-4 else f"wrong: two layers alike, merged, are not one of them ({error:.1e})"


def _pair(model: PreTrainedModel, layer: int) -> bool:
    """Whether a layer and the next one are of one kind by the config."""
    kinds = pattern_of(model).kinds
    return kinds[layer] == kinds[layer + 1]


def _behind(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """The stream behind the last layer, in float64."""
    with torch.no_grad():
        return PartialRun(model, "tokens", num_layers(model))(windows).double()


def _cut_and_loaded(model: PreTrainedModel, plan: PrunePlan) -> str:
    cut = apply_plan(model, plan)
    (joint,) = plan.joints
    patch = joint.patch or torch.nn.Identity()
    if not torch.equal(_logits(cut), _logits(model, range(*_GONE), patch)):
        return "not the dense model with the layers bypassed"
    if _written(cut, cached=True) != _written(cut, cached=False) and (
        _written(model, cached=True) == _written(model, cached=False)
    ):
        return "writes something else with a cache"
    with tempfile.TemporaryDirectory() as folder:
        cut.save_pretrained(folder)
        again = ModelSource(folder, device="cpu").load()
    again.set_attn_implementation("eager")
    error = float((_logits(again) - _logits(cut)).abs().max() / _logits(cut).abs().max())
    if type(again) is not type(cut) or not error < 1e-5:
        return f"computes something else when loaded again ({error:.1e})"
    shallow = keep_layers(again, [0, 2, 3, 5])
    if not torch.equal(_logits(shallow), _logits(again, [1, 4])):
        return "cut again, not the model with the layers bypassed"
    return WORKS


def _made(model_type: str) -> PreTrainedModel | str:
    """A tiny model, or why none was made."""
    try:
        return tiny_decoder(model_type)
    except TimeoutError:
        raise
    except Exception as error:
        return _line(error)


def _line(error: Exception) -> str:
    return said(error).partition("\n")[0]


def model_types() -> list[str]:
    """All that Transformers has a causal LM of, or a model that writes on text and images."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def page(found: dict[str, str], merges: dict[str, str]) -> str:
    """The whole page in Markdown, of what each type came to, and those that can be cut when they were merged."""
    works = [name for name, outcome in found.items() if outcome == WORKS]
    others = {
        kind: {
            name: outcome.removeprefix(f"{kind}: ") for name, outcome in found.items() if outcome.startswith(f"{kind}:")
        }
        for kind in (IN_PART, PATCHED, REMOVAL, "refused", "wrong", NOT_TRIED)
    }
    cut = len(works) + sum(len(others[kind]) for kind in (IN_PART, PATCHED, REMOVAL))
    sections = [
        f"{MADE_BY}\n\n# Which models can be cut\n\nBy the `model_type` of a model's config, as transformers "
        f"{transformers.__version__} has them: {cut} of {len(found)} can. Each was tried "
        f"as a random model of {_LAYERS} layers, {_WIDTH} wide: calibrated, cut, held against the dense model with the "
        "same layers bypassed (equal bit for bit), written with and without a cache, saved, loaded, cut again; the "
        "same with a patch at the joint; and the weights around the joint fitted again, which must change nothing "
        "where it is allowed no change, and else come nearer to the dense model where all is fitted. That shows "
        "wiring, and nothing of quality. Of a model that reads more than text the text's decoder is cut, on text; what "
        "reads the rest stays.",
        "## Refitted\n\n`--heal refit` and `auto` fit again all that reads the stream around a joint and all that "
        "writes to it: " + _listed(works),
        "## Refitted in part\n\nThe same, and this stays as it is:\n\n" + _rows(others[IN_PART]),
        "## Removal and patches\n\n`--heal none` and `--heal patch`; no weights are fitted again.\n\n"
        + _rows(others[PATCHED]),
        "## Merged\n\nTwo layers, the second one a copy of the first, were merged with half the units of either, and "
        "the result is the model without the second: " + _listed([name for name in merges if merges[name] == WORKS]),
        "## Not merged\n\n"
        + _rows({name: told.removeprefix("refused: ") for name, told in merges.items() if told != WORKS}),
        *(["## Plain removal\n\n`--heal none` alone.\n\n" + _rows(others[REMOVAL])] if others[REMOVAL] else []),
        "## Refused\n\n" + _rows(others["refused"]),
        *(["## Wrong\n\n" + _rows(others["wrong"])] if others["wrong"] else []),
        "## Not tried\n\nNo tiny model of these was made. Whoever has a real one can try: what is wrong is refused."
        "\n\n" + _rows(others[NOT_TRIED]),
    ]
    return "\n\n".join(sections) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) + "."


def _rows(found: dict[str, str]) -> str:
    lines = [f"| `{name}` | {why.replace('|', '/')} |" for name, why in found.items()]
    return "\n".join(["| model_type | why |", "|---|---|", *lines])


def _out_of_time(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _out_of_time)
    found, merges = {}, {}
    for name in sys.argv[1:] or model_types():
        # Some sizes go by names of their own, and are those of a real model.
        signal.alarm(_SECONDS)
        try:
            found[name] = tried(name)
            if found[name].startswith(WORKS):
                merges[name] = merged(name)
        except TimeoutError:
            found[name] = f"{NOT_TRIED}: took more than {_SECONDS} seconds"
        signal.alarm(0)
        print(name, found[name], sep=": ", flush=True)
        print(f"{name}, merged: {merges.get(name, NOT_TRIED)}", flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(found, merges), encoding="utf-8")
        print(PAGE)
