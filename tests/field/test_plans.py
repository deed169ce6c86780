"""Two descriptions of one thing are compared, and what a file says is asked for by type and size before it is used."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.distillation.teacher_store import StoreRequest, TeacherStore, write_teacher_store
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import Entries, finite
from linearpatch_kernels.healing.merge_search import plan_merging
from linearpatch_kernels.merging.consistency import check_merges
from linearpatch_kernels.merging.plan import MergePlan
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.consistency import check_kept_layers, check_patches, check_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.search import plan_pruning
from tests.support.field import SMALL, linearpatch, save_model, text_file, tiny


def token_windows(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and outputs of it: cuts of the same depth, the same cut from another text, a stock one, merges."""
    folder = tmp_path_factory.mktemp("plans")
    save_model(tiny(), folder / "dense")
    text_file(folder)
    (folder / "other.txt").write_text(" ".join(str(i * i % 93) for i in range(4000)))
    for name, spans, fit, text in (
        ("pruned", "2:4", "linearpatch", "numbers.txt"),
        ("cut", "1:3", "linearpatch", "numbers.txt"),
        ("retold", "2:4", "linearpatch", "other.txt"),
        ("ranked", "2:4", "low-rank", "numbers.txt"),
        ("stock", "2:4", "none", "numbers.txt"),
        ("stock-cut", "1:3", "none", "numbers.txt"),
    ):
        flags = ["--spans", spans, "--fit", fit, "--text", folder / text, *SMALL]
        assert linearpatch("prune", folder / "dense", "-o", folder / name, *flags) is None
    small = ["--text", folder / "numbers.txt", "--samples", 4, "--length", 16, "--device", "cpu", "--heal", "none"]
    for name, more in (("merged", ["--layers", 4]), ("pairs", ["--layers", 4, "--variant", "come", "--no-repeat"])):
        assert linearpatch("merge", folder / "dense", "-o", folder / name, *small, *more) is None
    return folder


def plan_files(directory: Path) -> dict[str, Path]:
    """The plan's files, wherever in an output they lie."""
    names = ("plan.json", "plan.safetensors", "merge.json")
    return {path.name: path for path in directory.rglob("*") if path.name in names}


def with_files_of(place: Path, output: Path, name: str, other: str, *files: str) -> Path:
    """A copy of an output with some of its plan's files from another one."""
    shutil.copytree(place / name, output)
    for file in files:
        shutil.copy(plan_files(place / other)[file], plan_files(output)[file])
    return output


def distill(place: Path, directory: Path, *more: Any) -> Exception | None:
    flags = ["--text", place / "numbers.txt", "--length", 16, "--steps", 2, "--heldout", 2, "--top-k", 5]
    output = directory.with_name(f"{directory.name}-distilled")
    return linearpatch(
        "distill", directory, "--teacher", place / "dense", "-o", output, *flags, "--device", "cpu", *more
    )


BOTH = ("plan.json", "plan.safetensors")


@pytest.mark.parametrize(
    ("name", "other", "files", "named", "more"),
    [
        ("pruned", "cut", BOTH, "config.json", []),
        ("pruned", "ranked", BOTH, "config.json", []),
        ("pruned", "retold", ("plan.safetensors",), "plan.safetensors", []),
        ("pruned", "retold", BOTH, "plan.safetensors", []),
        ("stock", "stock-cut", BOTH, "plan.json", ["--train", "suffix"]),
        ("merged", "pairs", ("merge.json",), "config.json", []),
    ],
    ids=["another cut", "another fit", "its tensors alone", "another text", "another cut, stock", "other merges"],
)
def test_the_plan_of_another_output_is_refused(
    place: Path, tmp_path: Path, name: str, other: str, files: tuple[str, ...], named: str, more: list[str]
) -> None:
    """The plan that came out named layers that were not removed, and its tensors were the untrained ones."""
    mixed = with_files_of(place, tmp_path / "mixed", name, other, *files)
    error = distill(place, mixed, *more)
    assert isinstance(error, InputError), error
    assert "do not belong together" in str(error)
    assert named in str(error)
    assert "\n" not in str(error)
    assert not (tmp_path / "mixed-distilled").exists()
    shown = linearpatch("inspect", mixed)
    assert isinstance(shown, InputError) == (named == "config.json")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("pruned", []),
        ("pruned", ["--dtype", "bfloat16"]),
        ("ranked", []),
        ("stock", ["--train", "suffix"]),
        ("merged", []),
        ("pairs", []),
    ],
)
def test_an_output_as_it_was_written_is_distilled_again_and_again(
    place: Path, tmp_path: Path, name: str, more: list[str]
) -> None:
    directory = tmp_path / name
    shutil.copytree(place / name, directory)
    if more[:1] == ["--dtype"]:
        # The plan tells of the model in its own precision.
        file = plan_files(directory)["plan.json"]
        file.write_text(json.dumps({**json.loads(file.read_text()), "model": ""}))
    assert distill(place, directory, *more) is None
    again = tmp_path / f"{name}-distilled"
    assert linearpatch("inspect", again) is None
    if more[:1] != ["--train"]:
        assert distill(place, again, *more) is None


def test_an_output_of_an_earlier_version_remembers_no_cut(place: Path, tmp_path: Path) -> None:
    directory = tmp_path / "old"
    shutil.copytree(place / "pruned", directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["linearpatch"].pop("provenance") == [{"num_layers": 6, "spans": ["2:4"]}]
    (directory / "config.json").write_text(json.dumps(config))
    assert distill(place, directory) is None


@pytest.mark.parametrize("fit", ["none", "scalar"])
def test_a_cut_of_a_cut_remembers_both(place: Path, tmp_path: Path, fit: str) -> None:
    flags = ["--spans", "3:4", "--fit", fit, "--text", place / "numbers.txt", *SMALL]
    assert linearpatch("prune", place / "pruned", "-o", tmp_path / "twice", *flags) is None
    config = json.loads((tmp_path / "twice" / "config.json").read_text())
    assert config["linearpatch"]["provenance"] == [
        {"num_layers": 6, "spans": ["2:4"]},
        {"num_layers": 4, "spans": ["3:4"]},
    ]
    plan = PrunePlan(4, (Joint(Span(3, 4)),))
    check_plan(plan, config, tmp_path)
    with pytest.raises(InputError, match="do not belong together"):
        check_plan(PrunePlan(4, (Joint(Span(1, 2)),)), config, tmp_path)
    assert linearpatch("inspect", tmp_path / "twice") is None


def test_where_two_descriptions_differ_is_told(place: Path, tmp_path: Path) -> None:
    plan = PrunePlan.load(plan_files(place / "pruned")["plan.json"].parent)
    config = json.loads((place / "pruned" / "config.json").read_text())
    check_plan(plan, config, tmp_path)
    for change, named in (
        (lambda c: c.update(num_hidden_layers=5), "leaves 4 layers and config.json has 5"),
        (lambda c: c["linearpatch"].update(joints={}), "at layer 2 and config.json none"),
        (lambda c: c["linearpatch"]["provenance"][0].update(num_layers=7), "'num_layers': 7"),
    ):
        other = copy.deepcopy(config)
        change(other)
        with pytest.raises(InputError, match=named):
            check_plan(plan, other, tmp_path)
    listed = copy.deepcopy(config)
    listed["linearpatch"]["joints"]["2"].append({"kind": "diagonal", "dim": 48})
    check_plan(plan, listed, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patches_are_the_plan_s_once_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    model, windows = tiny(), token_windows(6, 16)
    plan = plan_pruning(model, windows, spans=[Span(2, 4)], fit="low-rank", rank=4, noted=lambda _: None).plan
    pruned = apply_plan(model.to(dtype), plan)
    check_patches(plan, pruned, tmp_path)
    check_patches(plan, pruned.float(), tmp_path)
    chain = plan.joints[0].patch
    assert chain is not None
    with torch.no_grad():
        chain.patches[0].down[3, 2] *= 1.01  # type: ignore[index, operator]  # torch types a patch's parameter as a module
    with pytest.raises(InputError, match="other patches at layer 2"):
        check_patches(plan, pruned, tmp_path)


def test_layers_are_looked_for_in_the_teacher(tmp_path: Path) -> None:
    dense = tiny()
    student = apply_plan(dense, PrunePlan(6, (Joint(Span(2, 4)),)))
    check_kept_layers(PrunePlan(6, (Joint(Span(2, 4)),)), student, dense, tmp_path)
    wrong = PrunePlan(6, (Joint(Span(1, 3)),))
    with pytest.raises(InputError, match=r"its layer 1 is layer 1 of the teacher, and plan\.json says 3"):
        check_kept_layers(wrong, student, dense, tmp_path)
    # A layer that was trained is none of the teacher's.
    student.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(student.model.layers[1].mlp.down_proj.weight + 1)
    check_kept_layers(wrong, student, dense, tmp_path)


def test_merges_of_what_was_merged_before(tmp_path: Path) -> None:
    model, windows = tiny(), token_windows(4, 16)
    once, _ = plan_merging(model, windows, None, MergeSettings(layers=5))
    twice, plan = plan_merging(once, windows, None, MergeSettings(layers=4))
    config = {"num_hidden_layers": 4, "linearpatch_merge_tree": twice.config.linearpatch_merge_tree}
    check_merges(plan, config, tmp_path)
    for tree in (None, [0, 1, 2, 3], "x"):
        with pytest.raises(InputError, match="do not belong together"):
            check_merges(plan, {**config, "linearpatch_merge_tree": tree}, tmp_path)


# --- readers ---------------------------------------------------------------------------------------------------------

JUNK = ("x", None, -1, 0, 10**9, 10**30, 1.5, True, [], {}, [["x"]], {"a": {"b": 1}})


def places_in(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inner)[:12]:
        yield from places_in(value, (*path, key))


def put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(content)
    changed[path[0]] = put(content[path[0]], path[1:], value)
    return changed


def refusal(read: Callable[[], object]) -> str:
    """What a reader says where it refuses, in one line; "" where it does not. Anything else is the test's error."""
    try:
        read()
    except InputError as error:
        return str(error)
    return ""


def survives_junk(file: Path, read: Callable[[], object], *, every: int = 1) -> int:
    """Replace every value in a file (or only some), one after the other; returns how often the reader refused."""
    good = file.read_bytes()
    content = json.loads(good)
    refused = 0
    for path, value in list(itertools.product(places_in(content), JUNK))[::every]:
        file.write_text(json.dumps(put(content, path, value)))
        said = refusal(read)
        assert "\n" not in said, (path, value)
        refused += bool(said)
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", good[:-9]):
        file.write_bytes(raw)
        assert file.name in refusal(read)
    file.write_bytes(good)
    assert refusal(read) == ""
    return refused


@pytest.mark.parametrize("name", ["pruned", "ranked", "stock"])
def test_any_value_in_a_plan(place: Path, tmp_path: Path, name: str) -> None:
    """A dense patch of width 10**9 was made before its tensors were looked at; a score of 0 reached the table."""
    folder = tmp_path / "plan"
    folder.mkdir()
    for file in BOTH:
        shutil.copy(plan_files(place / name)[file], folder / file)
    assert survives_junk(folder / "plan.json", lambda: PrunePlan.load(folder)) > 60


def test_tensors_of_another_shape_are_not_read_in(place: Path, tmp_path: Path) -> None:
    for file in BOTH:
        shutil.copy(plan_files(place / "pruned")[file], tmp_path / file)
    about = json.loads((tmp_path / "plan.json").read_text())
    about["joints"][0]["patches"] = [{"kind": "dense", "dim": 60_000}]  # 14 GB
    (tmp_path / "plan.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="do not belong together"):
        PrunePlan.load(tmp_path)
    about["joints"] = [
        {"span": span, "fit": "x", "patches": [{"kind": "diagonal", "dim": dim}]}
        for span, dim in (("1:2", 4), ("3:4", 5))
    ]
    (tmp_path / "plan.json").write_text(json.dumps(about))
    save_file({"joint.1:2.0.scale": torch.ones(4), "joint.3:4.0.scale": torch.ones(5)}, tmp_path / "plan.safetensors")
    with pytest.raises(InputError, match="of different widths"):
        PrunePlan.load(tmp_path)


@pytest.mark.parametrize("name", ["merged", "pairs"])
def test_any_value_in_a_plan_of_merges(place: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "merge.json"
    shutil.copy(plan_files(place / name)["merge.json"], file)
    assert survives_junk(file, lambda: MergePlan.load(file)) > 60


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    folder = tmp_path_factory.mktemp("stores") / "store"
    return write_teacher_store(tiny(layers=2), token_windows(4, 8), folder, top_k=3, depths=[1], shard_windows=2)


@pytest.mark.parametrize("name", ["request.json", "index.json"])
def test_any_value_in_a_store(store: TeacherStore, tmp_path: Path, name: str) -> None:
    """0 windows in a shard, a vocabulary of null, a list of shards."""
    folder = tmp_path / "store"
    shutil.copytree(store.directory, folder)
    assert survives_junk(folder / name, lambda: TeacherStore.open(folder)) > 30


def test_windows_that_a_store_does_not_hold(store: TeacherStore) -> None:
    for window in (4, -1, 10**9):
        with pytest.raises(InputError, match=f"none of number {window}"):
            store.batch([0, window])


def test_a_request_that_is_damaged_is_written_again(store: TeacherStore, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(store.directory, folder)
    (folder / "request.json").write_text('{"format": ')
    with pytest.raises(InputError):
        StoreRequest.read(folder / "request.json")
    options: dict[str, Any] = {"top_k": 3, "depths": [1], "shard_windows": 2}
    again = write_teacher_store(tiny(layers=2), token_windows(4, 8), folder, **options)
    assert again.repaired == ("request.json",)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in store.directory.iterdir()
    }
    # Of another store it stays as it is.
    (folder / "request.json").write_text('{"format": ')
    with pytest.raises(InputError):
        write_teacher_store(tiny(layers=2), token_windows(4, 8, seed=1), folder, **options)
    assert (folder / "request.json").read_text() == '{"format": '


@pytest.mark.parametrize(
    "changes",
    [{"shard_windows": 0}, {"count": 0}, {"top_k": 98}, {"top_k": 0}, {"depths": (3, 1)}, {"depths": (1, 1)}],
    ids=str,
)
def test_requests_that_make_no_sense(store: TeacherStore, changes: dict[str, Any]) -> None:
    import dataclasses

    with pytest.raises(InputError, match="makes no sense"):
        dataclasses.replace(store.request, **changes)


def test_any_value_in_what_inspect_shows(place: Path, tmp_path: Path) -> None:
    """sweep.json and summary.json; a plan with a score of 0 ended in an internal error."""
    flags = ["--drop", "1-2", "--fits", "none", "--text", place / "numbers.txt", *SMALL]
    assert linearpatch("sweep", place / "dense", "-o", tmp_path / "sweep", *flags) is None
    shutil.copytree(place / "pruned", tmp_path / "pruned")

    def shown(directory: Path) -> None:
        error = linearpatch("inspect", directory)
        if error is not None:
            raise error

    (sweep,) = (tmp_path / "sweep").rglob("sweep.json")
    assert survives_junk(sweep, lambda: shown(tmp_path / "sweep"), every=11) > 5
    (summary,) = (tmp_path / "pruned").rglob("summary.json")
    assert survives_junk(summary, lambda: shown(tmp_path / "pruned"), every=31) > 2
    plan = plan_files(tmp_path / "pruned")["plan.json"]
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "score": 0}))
    error = linearpatch("inspect", tmp_path / "pruned")
    assert isinstance(error, InputError)
    assert "score must be text, not 0" in str(error)


def test_spans_of_any_number() -> None:
    for text in ("9" * 5000 + ":1", "1:" + "9" * 5000, "¹:²", "１:２"):
        with pytest.raises(InputError, match="write START:END"):
            Span.parse(text)
    with pytest.raises(InputError, match="no model has"):
        PrunePlan(10**12, (Joint(Span(1, 2)),))


def test_entries_are_asked_for_by_what_they_must_be() -> None:
    told = Entries(
        {"text": "a", "whole": 3, "real": 1.5, "table": {"x": 1}, "list": [1, 2], "none": None, "objects": [{"y": 2}]}
    )
    assert (told.text("text"), told.whole("whole"), told.real("real"), told.real("whole")) == ("a", 3, 1.5, 3.0)
    assert (told.table("table"), told.maybe_table("table"), told.maybe_table("none")) == ({"x": 1}, {"x": 1}, None)
    assert (told.rows("list"), told.listed("list").wholes(), told.listed("list").reals()) == (
        [1, 2],
        [1, 2],
        [1.0, 2.0],
    )
    assert [one.whole("y") for one in told.each("objects")] == [2]
    for ask, message in (
        (lambda: told.whole("text"), "text must be a whole number, not 'a'"),
        (lambda: told.whole("whole", 4), "whole must be from 4 to"),
        (lambda: told.whole("real"), "real must be a whole number"),
        (lambda: told.text("gone"), "it has no gone"),
        (lambda: told.entries("table").text("x"), "table.x must be text"),
        (lambda: told.each("objects")[0].text("y"), "objects.0.y must be text"),
        (lambda: told.each("list"), "list.0 must be an object"),
        (lambda: Entries({"x": float("nan")}).real("x"), "x must be finite"),
        (lambda: Entries({"x": True}).whole("x"), "x must be a whole number, not True"),
        (lambda: Entries([]), "no JSON object"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_json_has_no_word_for_what_is_not_finite(tmp_path: Path) -> None:
    assert finite({"a": [float("inf"), 1.5], "b": {"c": float("nan")}}) == {"a": [None, 1.5], "b": {"c": None}}
    plan = PrunePlan(6, (Joint(Span(1, 2)),), candidates=({"fit": "none", "perplexity": float("inf")},))
    plan.save(tmp_path)
    assert "Infinity" not in (tmp_path / "plan.json").read_text()
    assert PrunePlan.load(tmp_path).candidates == ({"fit": "none", "perplexity": None},)


def test_the_trained_patch_is_in_the_plan(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "pruned", tmp_path / "pruned")
    assert distill(place, tmp_path / "pruned", "--learning-rate", 0.01) is None
    output = tmp_path / "pruned-distilled"
    plan = PrunePlan.load(plan_files(output)["plan.json"].parent)
    check_patches(plan, load_model(output, device="cpu")[0], output)
    before = load_file(plan_files(place / "pruned")["plan.safetensors"])
    after = load_file(plan_files(output)["plan.safetensors"])
    assert before.keys() == after.keys()
