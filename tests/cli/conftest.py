"""The model and the text of all commands' tests, and places that cannot be written to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.command import SMALL, VOCABULARY, Outcome, Run, World, call, prose, tiny_llama, trained_tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    text = prose(4000, seed=1)
    (root / "text.txt").write_text(text, encoding="utf-8")
    tiny_llama().save_pretrained(root / "model")
    trained_tokenizer(text, VOCABULARY).save_pretrained(root / "model")
    cut = ["--drop", 2, "--fit", "auto", "-o", root / "pruned", "--text", root / "text.txt"]
    status = call("prune", root / "model", *cut, *SMALL)
    assert status == 0
    return World(root, root / "text.txt", root / "model", root / "pruned")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def runner(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = call(*arguments)
        return Outcome(status, *capfd.readouterr())

    return runner


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """A directory for outputs in which a refused command must leave nothing."""
    directory = tmp_path / "empty"
    directory.mkdir()
    yield directory
    assert os.listdir(directory) == []


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that nobody can write to, not even root where it is a file system of its own."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", directory], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"root, and nothing can be mounted here: {mounted.stderr.decode().strip()}")
        yield directory
        subprocess.run(["umount", directory], check=True)
    else:
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some of a checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)
