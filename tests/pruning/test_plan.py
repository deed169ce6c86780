"""Plans: what they refuse, and that files give back what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.pruning.plan import Joint, PrunePlan, checked_spans, parse_spans
from tests.support.tiny import random_patch


def full_plan() -> PrunePlan:
    """Every kind of patch, none, and two patches at a joint behind the last layer; given out of order."""
    return PrunePlan(
        num_layers=14,
        joints=(
            Joint(Span(12, 14), [random_patch("dense", seed=3), random_patch("diagonal", seed=4)], "least-squares"),
            Joint(Span(1, 3), random_patch("hadamard", seed=1), "hadamard-low-rank"),
            Joint(Span(8, 9), None, "none"),
            Joint(Span(5, 7), random_patch("low-rank", seed=2), "low-rank"),
        ),
        model="model's fingerprint",
        score="channel-cosine",
        calibration={"source": "prose ☃", "samples": 64, "length": 512},
        candidates=({"fit": "none", "loss": 3.0000000000000004, "kept": False}, {"fit": "low-rank", "loss": 2.5}),
    )


def test_joints_are_in_the_order_of_the_model() -> None:
    plan = full_plan()
    assert plan.spans == [Span(1, 3), Span(5, 7), Span(8, 9), Span(12, 14)]
    assert plan.kept_layers == [0, 3, 4, 7, 9, 10, 11]


def test_joint_positions_count_the_layers_that_are_left() -> None:
    positions = full_plan().joint_positions()
    assert {at: joint.span for at, joint in positions.items()} == {
        1: Span(1, 3),
        3: Span(5, 7),
        4: Span(8, 9),
        7: Span(12, 14),
    }
    assert PrunePlan(4, (Joint(Span(0, 2)),)).joint_positions().keys() == {0}


def test_a_plan_comes_back_bit_for_bit(tmp_path: Path) -> None:
    plan = full_plan()
    plan.save(tmp_path / "new" / "folder")
    loaded = PrunePlan.load(tmp_path / "new" / "folder")
    assert loaded.to_json() == plan.to_json()
    assert loaded.calibration["source"] == "prose ☃"
    assert loaded.candidates[0]["loss"] == 3.0000000000000004
    assert [joint.span for joint in loaded.joints] == plan.spans
    assert loaded.tensors().keys() == plan.tensors().keys()
    for name, tensor in plan.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    x = torch.randn(3, 48)
    for ours, theirs in zip(loaded.joints, plan.joints, strict=True):
        assert ours.fit == theirs.fit
        kinds = [None if joint.patch is None else [*map(type, joint.patch)] for joint in (ours, theirs)]
        assert kinds[0] == kinds[1]
        assert ours.patch is None or torch.equal(ours.patch(x), theirs.patch(x))
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["plan.json", "plan.safetensors"]
    loaded.save(tmp_path / "again")
    for name, content in plan.files().items():
        assert (tmp_path / "again" / name).read_bytes() == content


def test_the_file_says_what_a_person_wants_to_know(tmp_path: Path) -> None:
    full_plan().save(tmp_path)
    about = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (about["format"], about["version"], about["num_layers"]) == ("linearpatch-plan", 2, 14)
    assert [joint["span"] for joint in about["joints"]] == ["1:3", "5:7", "8:9", "12:14"]
    assert [[patch["kind"] for patch in joint["patches"]] for joint in about["joints"]] == [
        ["hadamard"],
        ["low-rank"],
        [],
        ["dense", "diagonal"],
    ]
    assert {"joint.12:14.0.weight", "joint.12:14.1.scale"} <= load_file(tmp_path / "plan.safetensors").keys()


def test_a_plan_without_patches(tmp_path: Path) -> None:
    PrunePlan(6, (Joint(Span(2, 4)),)).save(tmp_path)
    assert [joint.patch for joint in PrunePlan.load(tmp_path).joints] == [None]


# --- files that are no plans -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    full_plan().save(tmp_path)
    return tmp_path


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        PrunePlan.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_file_that_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"{name} is missing")


def test_a_folder_that_is_missing_or_is_a_file(folder: Path) -> None:
    refused(folder / "nothing", "holds no plan")
    refused(folder / "plan.json", "plan")


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_files_cut_short(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for length in (0, 1, 9, len(content) // 2, len(content) - 3):
        (folder / name).write_bytes(content[:length])
        refused(folder, "prune again")


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_folder_in_the_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, "plan")


@pytest.mark.parametrize("content", ["[]", '"plan"', "3", "{}", '{"format": "other"}', "\x00\x01", "no JSON"])
def test_foreign_json(folder: Path, content: str) -> None:
    (folder / "plan.json").write_text(content)
    refused(folder, "prune again")


def test_another_encoding(folder: Path) -> None:
    (folder / "plan.json").write_bytes(b'{"format": "\xff\xfe"}')
    refused(folder, "prune again")


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit_json(folder: Path) -> None:
        about = json.loads((folder / "plan.json").read_text())
        change(about)
        (folder / "plan.json").write_text(json.dumps(about))

    return edit_json


@pytest.mark.parametrize(
    "change",
    [
        edit(lambda about: about.update(version=3)),
        edit(lambda about: about.pop("joints")),
        edit(lambda about: about.pop("num_layers")),
        edit(lambda about: about.update(num_layers="fourteen")),
        edit(lambda about: about.update(joints=3)),
        edit(lambda about: about["joints"][0].pop("fit")),
        edit(lambda about: about["joints"][0].update(span=[1, 3])),
        edit(lambda about: about["joints"][0].update(span="3:1")),
        edit(lambda about: about["joints"][0].update(span="1:6")),
        edit(lambda about: about["joints"][0]["patches"][0].update(kind="cubic")),
        edit(lambda about: about["joints"][0]["patches"][0].update(dim="wide")),
        edit(lambda about: about["joints"][0]["patches"][0].update(dim=64)),
        edit(lambda about: about["joints"][0]["patches"][0].pop("rank")),
        edit(lambda about: about["joints"][0].update(patches={})),
        edit(lambda about: about["joints"][0].update(patches=about["joints"][0]["patches"][0])),
        edit(lambda about: about["joints"][0]["patches"].append({"kind": "diagonal", "dim": 48})),
        edit(lambda about: about["joints"][0].update(patches=[{"kind": "diagonal", "dim": 48}] * 10_000)),
        edit(lambda about: about.update(version=1)),
        edit(lambda about: about.update(candidates=7)),
    ],
    ids=[
        "version", "no-joints", "no-depth", "depth", "joints", "no-fit", "span", "reversed", "overlap", "kind", "dim",
        "width", "no-rank", "patch", "no-list", "one-more", "very-many", "older", "candidates",
    ],
)  # fmt: skip
def test_json_that_was_changed_by_hand(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    with pytest.raises(InputError) as caught:
        PrunePlan.load(folder)
    assert "\n" not in str(caught.value)


def test_tensors_of_another_plan(folder: Path) -> None:
    tensors = load_file(folder / "plan.safetensors")
    save_file({"weight": torch.ones(2)}, folder / "plan.safetensors")
    refused(folder, "do not belong together")
    save_file(tensors | {"joint.9:10.0.scale": torch.ones(48)}, folder / "plan.safetensors")
    refused(folder, "do not belong together")
    save_file(tensors | {"joint.12:14.0.weight": torch.ones(3, 3)}, folder / "plan.safetensors")
    refused(folder, "do not belong together")


# --- spans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "no span to remove"),
        ([Span(1, 4), Span(3, 5)], "the spans 1:4 and 3:5 overlap: a layer can be removed once"),
        ([Span(3, 5), Span(1, 4)], "the spans 1:4 and 3:5 overlap"),
        ([Span(1, 8), Span(3, 5)], "the spans 1:8 and 3:5 overlap"),
        ([Span(2, 4), Span(2, 4)], "the spans 2:4 and 2:4 overlap"),
        ([Span(3, 5), Span(1, 3)], "the spans 1:3 and 3:5 touch: write 1:5"),
        ([Span(4, 2)], "the span 4:2 does not fit a model of 8 layers"),
        ([Span(3, 3)], "the span 3:3 does not fit"),
        ([Span(-1, 2)], "the span -1:2 does not fit"),
        ([Span(5, 9)], "the span 5:9 does not fit a model of 8 layers: give 0 <= START < END <= 8"),
        ([Span(0, 8)], "all 8 layers would be removed"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, list) else "",
)
def test_spans_that_cannot_be_removed(spans: list[Span], message: str) -> None:
    for run in (lambda: checked_spans(spans, 8), lambda: PrunePlan(8, tuple(Joint(span) for span in spans))):
        with pytest.raises(InputError, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)


def test_spans_in_the_order_of_the_model() -> None:
    assert checked_spans([Span(5, 7), Span(0, 2), Span(7 + 1, 10)], 10) == [Span(0, 2), Span(5, 7), Span(8, 10)]


def test_spans_from_text() -> None:
    assert parse_spans("13:19,24:26") == [Span(13, 19), Span(24, 26)]
    assert parse_spans(" 1:2 , 4:6 ") == [Span(1, 2), Span(4, 6)]
    for text in ("", "1:2,", "1:2;4:6", "1:2 4:6"):
        with pytest.raises(InputError, match="write START:END"):
            parse_spans(text)
