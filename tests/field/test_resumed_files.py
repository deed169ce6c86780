"""What a killed run goes on from is sealed, so that a damaged bit is noticed; and it is nobody else's file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Span, calibrate
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainer import Distillation, TrainingSettings, distill
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import is_sealed, left_by_us, write_sealed
from linearpatch_kernels.healing.merge_search import plan_merging
from linearpatch_kernels.merging.plan import MergePlan
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import fit_patch
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from tests.support.field import SMALL, linearpatch, save_model, text_file, tiny


def token_windows(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def flips(content: bytes, count: int, seed: int = 10) -> list[bytes]:
    """Copies with a single bit that is another."""
    draw = random.Random(seed)
    found = []
    for place in draw.sample(range(len(content)), count):
        other = bytearray(content)
        other[place] ^= 1 << draw.randrange(8)
        found.append(bytes(other))
    return found


# --- the statistics of a sweep ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics() -> CalibrationStatistics:
    return calibrate(tiny(), token_windows(4, 16).split(2), moments=[Span(2, 4)])


def test_every_flipped_bit_of_statistics_is_noticed(statistics: CalibrationStatistics, tmp_path: Path) -> None:
    """4 of 25 changed the figures of a sweep."""
    file = tmp_path / "statistics"
    statistics.save(file, fingerprint="f")
    content = file.read_bytes()
    for other in [*flips(content, 60), content[:-1], content + b"0", content[: len(content) // 2]]:
        file.write_bytes(other)
        with pytest.raises(InputError, match=r"statistics.*calibrate again"):
            CalibrationStatistics.load(file, fingerprint="f")


def test_statistics_of_an_earlier_version_are_read(statistics: CalibrationStatistics, tmp_path: Path) -> None:
    """They held most means twice: over all tokens, and without the windows' first ones, which no score or fit read."""
    halved = ("token_cosine", "channel_cosine", "mean_abs", "hadamard_mean_abs")
    tensors = {name: torch.stack([getattr(statistics, name)] * 2) for name in halved}
    tensors["tokens"] = torch.tensor([64, 60])
    tensors["token_angle"] = torch.zeros_like(tensors["token_cosine"])
    tensors["last_token_angle"] = statistics.last_token_angle
    moments = statistics.moments[Span(2, 4)]
    tensors |= {"moments.2:4.xx": moments.xx, "moments.2:4.xy": moments.xy}
    about = {"format": "linearpatch-statistics-1", "fingerprint": "f", "samples": "4", "moments": '{"2:4": 64.0}'}
    save_file(tensors, tmp_path / "old", metadata=about)
    sealed = {**about, "format": "linearpatch-statistics-2", "samples": 4, "moments": {"2:4": 64.0}}
    write_sealed(tmp_path / "sealed", tensors, sealed)
    for file in ("old", "sealed"):
        loaded = CalibrationStatistics.load(tmp_path / file, fingerprint="f")
        for name in (*halved, "last_token_angle"):
            assert torch.equal(getattr(loaded, name), getattr(statistics, name))
        assert (loaded.samples, loaded.tokens) == (4, 64)
        assert loaded.moments[Span(2, 4)].yy == moments.yy
    tensors["mean_abs"] = tensors["mean_abs"][:, :2].clone()
    save_file(tensors, tmp_path / "old", metadata=about)
    with pytest.raises(InputError, match=r"mean_abs has the shape .* calibrate again"):
        CalibrationStatistics.load(tmp_path / "old", fingerprint="f")


class Killed(Exception):
    """In the place of a signal that nothing survives."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    save_model(tiny(), folder / "dense")
    text_file(folder)
    return folder


def killed_sweep(place: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep that ends behind its first pass; returns the file that it leaves."""
    save = CalibrationStatistics.save

    def killing(self: CalibrationStatistics, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationStatistics, "save", killing)
        assert isinstance(sweep(place, output), Killed)
    (file,) = output.parent.glob(f".{output.name}*")
    return file


def sweep(place: Path, output: Path) -> Exception | None:
    flags = ["--drop", "1-3", "--text", place / "numbers.txt", *SMALL]
    return linearpatch("sweep", place / "dense", "-o", output, *flags)


def points(output: Path) -> Any:
    (file,) = output.rglob("sweep.json")
    return json.loads(file.read_text())["points"]


def test_a_sweep_does_not_go_on_from_damaged_statistics(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(place, tmp_path / "whole") is None
    expected = points(tmp_path / "whole")
    file = killed_sweep(place, tmp_path / "out", monkeypatch)
    content = file.read_bytes()
    capsys.readouterr()
    assert sweep(place, tmp_path / "out") is None
    assert "going on from the calibration" in capsys.readouterr().err
    assert points(tmp_path / "out") == expected
    assert not file.exists()
    for other in flips(content, 3, seed=4):
        file.write_bytes(other)
        assert sweep(place, tmp_path / "out") is None
        said = " ".join(capsys.readouterr().err.split())
        assert f"note: {file} is damaged" in said
        assert "it is made again" in said
        assert "going on from" not in said
        assert points(tmp_path / "out") == expected


# --- the merges of a killed merge ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merges() -> MergePlan:
    _, plan = plan_merging(tiny(), token_windows(4, 16), None, MergeSettings(layers=4))
    return plan


def test_every_flipped_bit_of_kept_merges_is_noticed(merges: MergePlan, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    merges.keep(file)
    assert MergePlan.resume(file, "x") == MergePlan.load(file)
    assert MergePlan.load(file).belongs_to(merges)
    assert MergePlan.load(file).merges == merges.merges
    content = file.read_bytes()
    for other in [*flips(content, 60), content[:-1], content + b"0"]:
        file.write_bytes(other)
        with pytest.raises(InputError, match="it is made again"):
            MergePlan.resume(file, "it is made again")


def test_a_merge_does_not_go_on_from_damaged_merges(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--layers", 3, "--variant", "come", "--heal", "none", "--samples", 4, "--length", 16, "--device", "cpu"]
    command = ["merge", place / "dense", "--text", place / "numbers.txt", *flags, "-o", tmp_path / "out"]
    keep = MergePlan.keep

    def killing(self: MergePlan, file: Path) -> None:
        keep(self, file)
        if len(self.merges) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MergePlan, "keep", killing)
        assert isinstance(linearpatch(*command), Killed)
    (file,) = tmp_path.glob(".out*")
    content = file.read_bytes()
    # A unit that is another one makes another model.
    at = content.rindex(b"units") + 100 + content[content.rindex(b"units") + 100 :].index(b", ") - 1
    other = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    file.write_bytes(other)
    capsys.readouterr()
    assert linearpatch(*command) is None
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged" in said
    assert "going on from" not in said
    file.write_bytes(content)
    assert linearpatch(*command) is None
    assert "going on from 2 merges" in capsys.readouterr().err


# --- files of somebody else ------------------------------------------------------------------------------------------


def test_whose_file_it_is(merges: MergePlan, tmp_path: Path) -> None:
    assert not left_by_us(tmp_path / "nothing")
    merges.keep(tmp_path / "ours")
    assert left_by_us(tmp_path / "ours")
    assert is_sealed(tmp_path / "ours")
    write_sealed(tmp_path / "ours", {"x": torch.ones(3)}, {"a": 1})
    assert is_sealed(tmp_path / "ours")
    merges.save(tmp_path / "plain")
    assert left_by_us(tmp_path / "plain")
    assert not is_sealed(tmp_path / "plain")
    for content in (b"", b"thesis", b"\x00" * 100):
        (tmp_path / "theirs").write_bytes(content)
        assert not is_sealed(tmp_path / "theirs")
        with pytest.raises(InputError, match="is not a file of linearpatch and in its way"):
            left_by_us(tmp_path / "theirs")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    return write_teacher_store(tiny(), token_windows(6, 12), tmp_path_factory.mktemp("store") / "store", top_k=5)


def student() -> PreTrainedModel:
    dense = tiny()
    statistics = calibrate(dense, token_windows(4, 12).split(2))
    joint = Joint(Span(2, 4), fit_patch(statistics.at(Span(2, 4)), "linearpatch"))
    return apply_plan(dense, PrunePlan(6, (joint,)))


def train(store: TeacherStore, folder: Path, told: Callable[[str], None], steps: int = 6) -> Distillation:
    settings = TrainingSettings(steps=steps, learning_rate=3e-3)
    return distill(
        student(),
        store,
        joint=2,
        training=range(4),
        heldout=[4, 5],
        settings=settings,
        directory=folder,
        checkpoint_seconds=0.0,
        noted=told,
    )


@pytest.fixture(scope="module")
def trained(store: TeacherStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(store, folder, lambda _: None)
    return folder


def test_every_flipped_bit_of_a_checkpoint_is_noticed(store: TeacherStore, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (state,) = folder.glob("*.safetensors")
    content = state.read_bytes()
    for other in [*flips(content, 12), content[:-1]]:
        state.write_bytes(other)
        with pytest.raises(InputError, match=r"is damaged: .*delete .* to start the training again"):
            train(store, folder, lambda _: None)


def test_a_log_that_is_damaged_is_told_of(store: TeacherStore, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines()
    told: list[str] = []
    assert len(train(store, folder, told.append).log) == 6
    assert told == []
    for damaged, left in (
        ([lines[0].replace('"loss": ', '"loss": 1'), *lines[1:]], 6),
        ([lines[0], lines[1][:-9], *lines[2:]], 5),
        (lines[2:], 4),
        (["[" * 9000, *lines[1:]], 5),
        ([lines[0].replace('"loss": ', '"loss": "x", "y": '), *lines[1:]], 5),
    ):
        log.write_text("\n".join(damaged) + "\n")
        told.clear()
        assert len(train(store, folder, told.append).log) == left
        assert told == [f"{log} is damaged: figures of some steps are missing in it, or are others than they were"]


@pytest.mark.parametrize("name", ["log.jsonl", "state.safetensors"])
def test_a_run_does_not_write_over_files_of_others(store: TeacherStore, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    mine = "my notes\nof years\n"
    (folder / name).write_text(mine)
    with pytest.raises(InputError):
        train(store, folder, lambda _: None)
    assert (folder / name).read_text() == mine
