"""What is ours and what is not, and what happens to either."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import (
    MARKER,
    check_output,
    check_work_directory,
    claim_work_directory,
    directories,
    foreign_files,
    is_ours,
    owned,
    read_json,
    read_seal,
    reading,
    record,
    remove_work_directory,
    save_files,
    whole,
    working_alone,
    write_sealed,
    write_whole,
)
from linearpatch_kernels.files.owned import DRAFT, OUTPUT, mark
from tests.support.field import failing

FILES = {"config.json": "{}", "linearpatch/plan.json": "{}", "big.safetensors": os.urandom(5 << 20)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    save_files(tmp_path / "out", FILES)
    return tmp_path / "out"


def refused(directory: Path, what: str) -> None:
    before = tree(directory)
    with pytest.raises(InputError, match=what):
        check_output(directory, overwrite=True)
    with pytest.raises(InputError, match=what):
        save_files(directory, {"new": "1"}, overwrite=True)
    assert tree(directory) == before


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_the_marker_lists_what_was_written(out: Path) -> None:
    assert set(json.loads((out / MARKER).read_text())["files"]) == set(FILES)
    assert is_ours(out)
    assert foreign_files(out) == []
    save_files(out, {"other": "1"}, overwrite=True)
    assert tree(out).keys() == {"other", MARKER}


def test_a_listed_file_may_be_gone(out: Path) -> None:
    (out / "config.json").unlink()
    shutil.rmtree(out / "linearpatch")
    save_files(out, {"other": "1"}, overwrite=True)
    assert tree(out).keys() == {"other", MARKER}


def test_a_copy_is_as_good(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "copy")
    assert foreign_files(tmp_path / "copy") == []


PUT: dict[str, Callable[[Path], object]] = {
    "a file": lambda out: (out / "model-Q8_0.gguf").write_text("hours of quantising"),
    "a hidden file": lambda out: (out / ".notes").write_text("mine"),
    "a file in a directory of ours": lambda out: (out / "linearpatch" / "results.json").write_text("{}"),
    "a file in a directory of theirs": lambda out: ((out / "eval").mkdir(), (out / "eval" / "results.json").touch()),
    "a link": lambda out: (out / "checkpoint-1").symlink_to(out.parent),
    "a dangling link": lambda out: (out / "later").symlink_to("nowhere"),
    "a link in the place of a listed file": lambda out: (
        (out / "config.json").rename(out.parent / "config.json"),
        (out / "config.json").symlink_to(out.parent / "config.json"),
    ),
    "another config": lambda out: (out / "config.json").write_text('{"edited": true}'),
    "weights trained further": lambda out: (out / "big.safetensors").write_bytes(os.urandom(5 << 20)),
    "weights of another size": lambda out: (out / "big.safetensors").write_bytes(FILES["big.safetensors"][:-1]),
    "a pipe": lambda out: os.mkfifo(out / "pipe"),
}


@pytest.mark.parametrize("what", list(PUT))
def test_what_a_person_put_there_stays(out: Path, what: str) -> None:
    PUT[what](out)
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert len(foreign_files(out)) == 1
    for act in (lambda: check_output(out, overwrite=True), lambda: save_files(out, {"new": "1"}, overwrite=True)):
        with pytest.raises(InputError, match="did not write, or that were changed since"):
            act()
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == names


def test_outputs_of_0_1_0_are_known_by_their_names(out: Path) -> None:
    """Their marker lists nothing."""
    (out / "big.safetensors").unlink()
    (out / "linearpatch" / "plan.json").rename(out / "plan.json")
    (out / "linearpatch").rmdir()
    (out / "report").mkdir()
    for name in (
        *("generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_linearpatch.py"),
        *("plan.safetensors", "summary.json", "report/report.md", "report/depth-cosine.png", "report/log.jsonl"),
    ):
        (out / name).write_text("0.1.0")
    (out / MARKER).write_text('{"format": "linearpatch-checkpoint", "version": 1}')
    assert foreign_files(out) == []
    for name in ("model-Q8_0.gguf", "report/notes.md", "model.safetensors.bak", "plots/x.png", "Model.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        assert foreign_files(out) == [name]
        refused(out, re.escape(name))
        (out / name).unlink()
    shutil.rmtree(out / "plots")
    save_files(out, {"new": "1"}, overwrite=True)
    assert tree(out).keys() == {"new", MARKER}


@pytest.mark.parametrize(
    "marker", ["", "[1]", "null", '{"format": "linearpatch-checkpoint"', '{"format": 3}', "[" * 10**5]
)
def test_a_marker_that_cannot_be_read_owns_nothing(out: Path, marker: str) -> None:
    (out / MARKER).write_text(marker)
    refused(out, "is not an output of linearpatch")


@pytest.mark.parametrize("files", [[], 3, "config.json", {"config.json": None}, {"config.json": {"bytes": 2}}])
def test_a_list_that_was_edited_owns_nothing_it_does_not_describe(out: Path, files: Any) -> None:
    (out / MARKER).write_text(json.dumps({"format": OUTPUT, "version": 2, "files": files}))
    refused(out, "did not write")


def test_an_input_is_not_replaced(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    for source in (
        out,
        out / "config.json",
        tmp_path / "link" / "config.json",
        str(out / "linearpatch" / ".." / "big.safetensors"),
    ):
        with pytest.raises(InputError, match="still needed"):
            check_output(out, overwrite=True, made_from=[None, "owner/name", "", source])
    check_output(out, overwrite=True, made_from=[tmp_path, tmp_path / "nowhere"])


def test_what_appears_at_the_last_moment_is_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look and the exchange."""
    exchange = directories._exchanged

    def late(draft: Path, target: Path) -> bool:
        (target / "thesis.tex").write_text("mine")
        return exchange(draft, target)

    monkeypatch.setattr(directories, "_exchanged", late)
    with pytest.warns(UserWarning, match=r"files that appeared in .*out at the last moment are in .*out\.kept"):
        save_files(out, {"new": "1"}, overwrite=True)
    assert tree(out).keys() == {"new", MARKER}
    assert tree(out.parent / "out.kept").keys() == {"thesis.tex", MARKER}


def test_a_failed_exchange_leaves_the_old_output_where_it_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename, renamed = tree(out), Path.rename, []

    def refuses_the_second(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 3:  # one to try the place out, the old output, and now the new one
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(directories, "_exchanged", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuses_the_second)
    with pytest.raises(
        InputError, match=r"Input/output error\); it is as it was before, and what was finished is kept"
    ):
        save_files(out, {"new": "1"}, overwrite=True)
    assert tree(out) == before
    assert tree(out.parent / "out.unfinished").keys() == {"new", MARKER}


def test_an_old_output_that_a_kill_left_aside_comes_back(out: Path) -> None:
    aside = out.with_name(f".out.linearpatch-{'0' * 32}-old")
    out.rename(aside)
    save_files(out.parent / "other", {"a": "1"})
    assert aside.exists()
    with pytest.raises(InputError, match="holds an earlier output"):
        save_files(out, {"new": "1"})
    assert tree(out).keys() == {*FILES, MARKER}


def test_only_drafts_of_ours_are_stale(out: Path) -> None:
    draft, theirs = (out.with_name(f".out.linearpatch-{digit * 32}") for digit in "01")
    named, other, pipe, finished = (out.with_name(f".out.linearpatch-{name}") for name in ("mine", "x", "y", "2" * 32))
    for directory in (draft, theirs, named, other):
        directory.mkdir()
        (directory / "x").write_text("mine")
    mark(draft, DRAFT)
    mark(other, DRAFT)
    os.mkfifo(pipe)
    shutil.copytree(out, finished)
    (finished / "x").write_text("mine")
    save_files(out, {"new": "1"}, overwrite=True)
    assert not draft.exists()
    assert (theirs / "x").exists()
    assert (named / "x").exists()
    assert (other / "x").exists()
    assert pipe.is_fifo()
    assert tree(finished).keys() == {"x", MARKER}


@pytest.mark.parametrize("earlier", [False, True])
def test_who_may_look_into_an_output_stays_as_it_was(tmp_path: Path, earlier: bool) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    if earlier:
        save_files(tmp_path / "out", {"a": "1"})
        (tmp_path / "out").chmod(0o2750)
    save_files(tmp_path / "out", {"a": "2"}, overwrite=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == (0o2750 if earlier else 0o700)


@pytest.mark.parametrize("length", [120, 215, 255])
def test_a_long_name_is_no_reason(tmp_path: Path, length: int) -> None:
    out = tmp_path / ("ß" * (length // 2))
    for content in "12":
        save_files(out, {"a": content}, overwrite=True)
    assert (out / "a").read_text() == "2"
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "~nobody-of-this-name/out", "x" * 300 + "/out"])
def test_names_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        check_output(name)
    assert os.listdir(tmp_path) == []


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "loop", tmp_path / "loop" / "out"):
        with pytest.raises(InputError, match="loop"):
            check_output(place)


def test_records_lie_in_a_directory_of_their_own_and_are_found_where_0_1_0_put_them(tmp_path: Path) -> None:
    assert record(tmp_path, "plan.json") == tmp_path / "linearpatch" / "plan.json"
    (tmp_path / "plan.json").touch()
    assert record(tmp_path, "plan.json") == tmp_path / "plan.json"
    (tmp_path / "linearpatch").mkdir()
    (tmp_path / "linearpatch" / "plan.json").touch()
    assert record(tmp_path, "plan.json") == tmp_path / "linearpatch" / "plan.json"


# --- what a file system may lack -------------------------------------------------------------------------------------


def is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


LACKING: dict[str, tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    **{f"locks ({errno.errorcode[code]})": (fcntl, "flock", failing(code)) for code in (38, 37, 95, 22, 13)},
    "modes": (os, "chmod", failing(errno.EPERM)),
    "modes of paths": (Path, "chmod", failing(errno.EPERM)),
    "flushing directories": (os, "fsync", failing(errno.EINVAL, is_directory)),
    "an exchange": (directories, "_exchanged", lambda _: lambda *_: False),
    "a size": (shutil, "disk_usage", lambda _: lambda _: shutil._ntuple_diskusage(0, 0, 0)),
}


@pytest.mark.parametrize("what", list(LACKING))
def test_niceties_do_not_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    place, name, failing = LACKING[what]
    monkeypatch.setattr(place, name, failing(getattr(place, name)))
    for content in "12":
        save_files(tmp_path / "out", {"a": content}, overwrite=True)
        write_whole(tmp_path / "file", content.encode())
        with working_alone(tmp_path / "work", re.compile("x")):
            write_sealed(tmp_path / "work" / "x", {"t": torch.ones(3)}, {"n": content})
    monkeypatch.undo()
    assert tree(tmp_path / "out").keys() == {"a", MARKER}
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "file").read_text() == "2"
    assert read_seal(tmp_path / "work" / "x")[0] == {"n": "2"}
    assert sorted(os.listdir(tmp_path)) == ["file", "out", "work"]


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_what_is_needed_is_tried_up_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A mount on which directories cannot be renamed, or not made, is told of before the work."""
    monkeypatch.setattr(Path, call, failing(errno.ENOSYS)(getattr(Path, call)))
    with pytest.raises(InputError, match=r"cannot be written \(Function not implemented\): give"):
        check_output(tmp_path / "out")
    assert os.listdir(tmp_path) == []


# --- single files and working directories ----------------------------------------------------------------------------


def test_a_file_keeps_its_mode_and_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    (tmp_path / "f").chmod(0o600)
    for name in (".f.tmp", f".f.{os.getpid()}.tmp", ".f.1.tmp"):
        (tmp_path / name).write_text("mine")
    write_whole(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == sorted([".f.tmp", f".f.{os.getpid()}.tmp", ".f.1.tmp", "f"])


WORK = re.compile(r"(group-\d+/)?state\.safetensors")


def test_a_working_directory_is_ours_by_its_marker_and_its_names(tmp_path: Path) -> None:
    work = tmp_path / "out.work" / "run"
    check_work_directory(work, WORK)
    claim_work_directory(work)
    (work / "group-3").mkdir()
    for name in ("state.safetensors", "group-3/state.safetensors", f".state.safetensors.{'0' * 32}.tmp"):
        (work / name).write_text("ours")
    check_work_directory(work, WORK)
    for name in (
        "thesis.txt",
        "group-3/log",
        ".important.tmp",
        ".state.safetensors.1.tmp",
        "group-x/state.safetensors",
    ):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("mine")
        with pytest.raises(InputError, match=re.escape(f"({name})")):
            check_work_directory(work, WORK)
        (work / name).unlink()
    (work / "thesis.txt").write_text("mine")
    assert not remove_work_directory(work, WORK)
    assert tree(work).keys() == {"thesis.txt", MARKER}
    (work / "thesis.txt").unlink()
    assert remove_work_directory(work, WORK)
    assert not work.exists()


def test_a_directory_that_was_there_before_is_not_removed(tmp_path: Path) -> None:
    work = tmp_path / "run"
    work.mkdir()
    (work / "state.safetensors").write_text("of 0.1.0, or of somebody")
    check_work_directory(work, WORK)
    claim_work_directory(work)
    assert not remove_work_directory(work, WORK)
    assert os.listdir(work) == ["state.safetensors"]


@pytest.mark.parametrize("place", ["run", "."])
def test_a_file_or_a_link_is_no_working_directory(tmp_path: Path, place: str) -> None:
    parent = tmp_path / "out.work"
    if place == ".":
        parent.write_text("mine")
    else:
        parent.mkdir()
        (parent / "run").symlink_to(tmp_path)
    with pytest.raises(InputError, match="where unfinished work is kept"):
        check_work_directory(parent / "run", WORK)


def test_half_written_files_of_a_killed_process_are_removed_and_no_others(tmp_path: Path) -> None:
    unfinished = whole.temporary_name(tmp_path / "state.safetensors")
    for name in (unfinished.name, ".important.tmp", ".state.safetensors.5.tmp", f".notes.{'0' * 32}.tmp"):
        (tmp_path / name).write_text("x")
    with working_alone(tmp_path, WORK):
        assert not unfinished.exists()
    assert len(os.listdir(tmp_path)) == 3


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        working_alone(tmp_path, WORK),
        pytest.raises(InputError, match="another process works in"),
        working_alone(tmp_path, WORK),
    ):
        pass


@pytest.mark.parametrize("content", [b"mine", b'{"linearpatch": {"joints": {}}}', b'{"quality": 1}', b"\xff\xfe"])
def test_a_single_file_is_ours_by_what_it_says(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    with pytest.raises(InputError, match="no file of linearpatch's"):
        owned.check_file(file, "f")
    for ours in (b"", b'{"format": "linearpatch-merge", "version": 1}'):
        file.write_bytes(ours)
        owned.check_file(file, "f")
    write_sealed(file, {"t": torch.ones(3)}, {})
    owned.check_file(file, "f")


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"[1]", b"3", b"{", b"\xff\xfe", b"[" * 10**5, b'{"a": ' * 10**5, b"NaN"])
def test_whatever_a_parser_says_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'f.json'}")) as caught:
        read_json(tmp_path / "f.json", "copy it again")
    assert str(caught.value).endswith(": copy it again")
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json is missing: copy it again"):
        read_json(tmp_path / "nowhere.json", "copy it again")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\): copy it again"):
        read_json(tmp_path, "copy it again")


@pytest.mark.parametrize(
    "error", [ValueError("one\ntwo"), RecursionError(), KeyError("x"), OverflowError(3), AssertionError()]
)
def test_no_list_of_exceptions_is_complete(error: Exception) -> None:
    with pytest.raises(InputError, match="the file cannot be read"), reading("the file", "copy it again"):
        raise error


def test_a_file_that_is_a_link_to_itself_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop"):
        owned.check_file(tmp_path / "loop", "the figures")
