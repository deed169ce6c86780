"""What a config says of patches is looked at before anything is built from it.

What was found: a joint's ``pre_scale`` of 10**9 filled the memory, ``linearpatch`` of another type and a kind that is a
list were TypeErrors from inside, a joint written as "02" was silently not patched.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import merge_tree
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import PATCHED_CLASSES, checked_record, patched_model
from linearpatch_kernels.nn import DensePatch, HadamardPatch, NormLinearPatch, Patch, build_patch, check_description
from tests.support.field import IDS, save_model, tiny

HUGE = 10**9
HADAMARD = {"kind": "hadamard", "dim": 48, "rank": 4, "pre_scale": True, "post_scale": False}

DESCRIPTIONS: dict[str, Any] = {
    "a number": 7,
    "nothing": None,
    "a word": "dense",
    "a list": [["kind", "dense"]],
    "no kind": {"dim": 48},
    "a list as kind": {"kind": [], "dim": 48},
    "a table as kind": {"kind": {}, "dim": 48},
    "an unknown kind": {"kind": "fourier", "dim": 48},
    "no width": {"kind": "dense"},
    "a fraction as width": {"kind": "dense", "dim": 48.0},
    "a switch as width": {"kind": "dense", "dim": True},
    "a word as width": {"kind": "dense", "dim": "48"},
    "a width of nothing": {"kind": "dense", "dim": None},
    "another width": {"kind": "dense", "dim": 47},
    "a negative width": {"kind": "diagonal", "dim": -48},
    "a huge width": {"kind": "dense", "dim": HUGE},
    "an endless width": {"kind": "dense", "dim": 10**4000},
    "a huge rank": {"kind": "low-rank", "dim": 48, "rank": HUGE},
    "a rank above the width": {**HADAMARD, "rank": 49},
    "a negative rank": {**HADAMARD, "rank": -1},
    "no rank": {"kind": "low-rank", "dim": 48, "rank": 0},
    "a rank of nothing": {"kind": "low-rank", "dim": 48, "rank": None},
    "huge scales": {**HADAMARD, "pre_scale": HUGE},
    "a number as a switch": {**HADAMARD, "post_scale": 1},
    "a negative switch": {**HADAMARD, "pre_scale": -1},
    "a field of another kind": {"kind": "dense", "dim": 48, "rank": 4},
    "a field of the constructor": {"kind": "dense", "dim": 48, "device": "cuda"},
    "another field of the constructor": {"kind": "dense", "dim": 48, "dtype": "int8"},
    "a whole number as eps": {"kind": "norm-linear", "dim": 48, "eps": 1},
    "a word as eps": {"kind": "norm-linear", "dim": 48, "eps": "1e-6"},
    "a negative eps": {"kind": "norm-linear", "dim": 48, "eps": -1e-6},
    "an eps that is no number": {"kind": "norm-linear", "dim": 48, "eps": float("nan")},
    "an endless eps": {"kind": "norm-linear", "dim": 48, "eps": float("inf")},
    "a number as switch of H": {"kind": "norm-linear", "dim": 48, "hadamard": 1},
    "the order of no matrix": {"kind": "norm-linear", "dim": 48, "order": 48},
    "another order": {"kind": "norm-linear", "dim": 48, "hadamard": True, "order": 24},
    "a rank above the width of the stream": {"kind": "norm-linear", "dim": 48, "rank": 49},
}
RECORDS: dict[str, Any] = {
    "a word": "x",
    "a list": [],
    "a number": 5,
    "no joints": {},
    "joints of nothing": {"joints": None},
    "a list of joints": {"joints": [HADAMARD]},
    "a joint behind the last": {"joints": {"5": HADAMARD}},
    "a negative joint": {"joints": {"-1": HADAMARD}},
    "a joint with a zero": {"joints": {"02": HADAMARD}},
    "a joint with a space": {"joints": {" 2": HADAMARD}},
    "a word as joint": {"joints": {"x": HADAMARD}},
    "a huge joint": {"joints": {str(HUGE): HADAMARD}},
    "a long chain": {"joints": {"2": [{"kind": "diagonal", "dim": 48}] * 10_000}},
    "a chain in a chain": {"joints": {"2": [[HADAMARD]]}},
    "a newer format": {"format": 3, "joints": {"2": HADAMARD}},
    "a provenance of words": {"joints": {"2": HADAMARD}, "provenance": "x"},
}


@pytest.fixture
def no_patch_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a patch was built")

    monkeypatch.setattr(Patch, "__init__", forbidden)


def one_line(caught: pytest.ExceptionInfo[InputError]) -> bool:
    return "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.usefixtures("no_patch_is_built")
@pytest.mark.parametrize("description", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_description_is_refused_before_anything_is_built(description: Any) -> None:
    for check in (check_description, build_patch):
        with pytest.raises(InputError) as caught:
            check(description, dim=48)
        assert one_line(caught)
    with pytest.raises(InputError, match=r"^joint 2 of the config: ") as caught:
        checked_record({"joints": {"2": [HADAMARD, description]}}, 4, 48)
    assert one_line(caught)


@pytest.mark.usefixtures("no_patch_is_built")
@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_is_refused_before_anything_is_built(record: Any) -> None:
    config_class, _, causal_lm_class = PATCHED_CLASSES["llama"]
    sizes = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4}
    with pytest.raises(InputError) as caught:
        config_class(**sizes, linearpatch=record)
    assert one_line(caught)
    # A config that was changed after it was made.
    config = config_class(**sizes)
    config.linearpatch = record
    with pytest.raises(InputError):
        causal_lm_class(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cut = keep_layers(tiny(), [0, 1, 4, 5])
    model = patched_model(cut, {2: HadamardPatch(48, 4, pre_scale=True), 4: DensePatch(48)}, provenance={"spans": []})
    return save_model(model, tmp_path_factory.mktemp("patched"))


@pytest.mark.parametrize("change", [*DESCRIPTIONS, *RECORDS])
def test_a_config_file_that_somebody_changed(checkpoint: Path, tmp_path: Path, change: str) -> None:
    entries = json.loads((checkpoint / "config.json").read_text())
    if change in DESCRIPTIONS:
        entries["linearpatch"]["joints"]["2"] = DESCRIPTIONS[change]
    else:
        entries["linearpatch"] = RECORDS[change]
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(entries))
    for read in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(InputError) as caught:
            read(tmp_path)
        assert one_line(caught)


def test_what_was_written_before_is_read() -> None:
    """One description or a list of them, with or without the format, without the fields that have defaults."""
    record = {
        "joints": {"0": HADAMARD, "2": [HADAMARD, {"kind": "hadamard", "dim": 48}], "4": []},
        "provenance": [{"spans": ["2:4"]}],
        "note": "of a later version",
    }
    lists = {**record["joints"], "0": [HADAMARD]}
    for extra in ({}, {"format": 1}):
        assert checked_record({**record, **extra}, 4, 48) == {**record, "format": 2, "joints": lists}
    assert checked_record({**record, "format": 2, "joints": lists}, 4, 48)["joints"] == lists
    with pytest.raises(InputError, match="joint 0 of the config: a joint holds a list of patches, not"):
        checked_record({**record, "format": 2}, 4, 48)
    assert checked_record(None, 4, 48) == {"format": 2, "joints": {}}


def test_a_depth_that_a_file_says_is_not_counted_up_to() -> None:
    """A config of 10**9 layers made a name for every one of its joints."""
    record = {"joints": {str(HUGE): HADAMARD}}
    with pytest.raises(InputError):
        checked_record(record, HUGE - 1, 48)
    assert checked_record({"joints": {"7": HADAMARD}}, HUGE, 48)["joints"] == {"7": [HADAMARD]}


_DEEP: list[Any] = [0, 1]
for _ in range(900):
    _DEEP = [_DEEP, 0]


@pytest.mark.parametrize(
    "tree", ["012345", 5, {}, [0], [0, 1, 2, 3, 4, "5"], [0, 1, 2, 3, 4, 5.0], [0, 1, 2, 3, 4, []], [*range(5), _DEEP]]
)
def test_a_merge_tree_that_is_none_is_refused(tree: Any) -> None:
    model = tiny()
    model.config.linearpatch_merge_tree = tree
    with pytest.raises(InputError, match="linearpatch_merge_tree") as caught:
        merge_tree(model)
    assert one_line(caught)


@pytest.mark.parametrize("tree", ["01234", 5, {}, [0]])
def test_a_merge_tree_of_another_depth_is_not_cut(tree: Any) -> None:
    model = tiny()
    model.config.linearpatch_merge_tree = tree
    with pytest.raises(InputError, match="linearpatch_merge_tree does not have an entry for each of 6 layers"):
        keep_layers(model, [0, 1])


@pytest.mark.parametrize("entries", [["full_attention"] * 4, "full", 5])
def test_a_list_of_another_length_than_the_depth_is_refused(entries: Any) -> None:
    model = tiny()
    model.config.layer_types = entries
    with pytest.raises(InputError, match="the config's layer_types does not have an entry for each of 6 layers"):
        keep_layers(model, [0, 1])


@pytest.mark.parametrize("rank", [0, 1, 48])
def test_every_description_of_a_patch_is_accepted(rank: int) -> None:
    normed = (NormLinearPatch(48, rank, hadamard=turned, eps=1e-5) for turned in (False, True))
    for patch in (HadamardPatch(48, rank, post_scale=True), DensePatch(48), *normed):
        assert build_patch(patch.description(), dim=48).description() == patch.description()


def test_a_switch_is_no_count() -> None:
    patch = HadamardPatch(48, pre_scale=HUGE)  # type: ignore[arg-type]  # the slip that is meant
    assert patch.num_parameters == 96


# --- a model under another family ------------------------------------------------------------------------------------


def test_a_patched_model_read_by_another_familys_class_is_refused(tmp_path: Path) -> None:
    """Transformers warns of another model type and goes on, without the biases of Qwen 2."""
    cut = keep_layers(tiny("qwen2"), [0, 1, 4, 5])
    model = patched_model(cut, {2: DensePatch(48)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    save_model(model, tmp_path)
    for auto_class in PATCHED_CLASSES["llama"]:
        with pytest.raises(InputError, match=r"a model of type 'linearpatch_qwen2' is no linearpatch_llama"):
            auto_class.from_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, "model_type": "linearpatch_llama"}))
    with pytest.raises(InputError, match="do not fit the config"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_stock_model_is_read_by_the_patched_class_of_its_family(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    again = PATCHED_CLASSES["llama"][2].from_pretrained(tmp_path)
    assert again.config.linearpatch == {"format": 2, "joints": {}}
    assert again.config.model_type == "linearpatch_llama"
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("patch", [nn.Linear(48, 48), nn.Sequential(), nn.Sequential(nn.Linear(48, 48))])
def test_what_is_no_patch_is_not_put_at_a_joint(patch: nn.Module) -> None:
    model = tiny()
    before = copy.deepcopy(model.config)
    with pytest.raises(InputError, match="joint 2"):
        patched_model(model, {2: patch})
    assert model.config == before
