from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import directories
from linearpatch_kernels.files.owned import DRAFT, mark
from linearpatch_kernels.modeling import saving
from linearpatch_kernels.modeling.saving import check_output, is_ours, save_checkpoint, save_files
from tests.support.tiny import tiny_model, tiny_patched_model, tiny_tokenizer


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama", layers=2)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_stock_model_is_a_stock_checkpoint(llama: PreTrainedModel, ids: torch.Tensor, tmp_path: Path) -> None:
    save_checkpoint(llama, tiny_tokenizer(), tmp_path / "out", extra_files={"plan.json": "{}", "plots/a.png": b"\x89"})
    files = contents(tmp_path / "out")
    assert json.loads(files["config.json"])["architectures"] == ["LlamaForCausalLM"]
    assert "modeling_linearpatch.py" not in files
    assert files["plan.json"] == b"{}"
    assert files["plots/a.png"] == b"\x89"
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, llama(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("5 7").input_ids == [9, 11]
    assert os.listdir(tmp_path) == ["out"]


def test_a_patched_model_brings_its_code(tmp_path: Path) -> None:
    save_checkpoint(tiny_patched_model("llama"), None, tmp_path / "out")
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_linearpatch.py"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_others_may_read_the_weights(llama: PreTrainedModel, tmp_path: Path) -> None:
    save_checkpoint(llama, None, tmp_path / "out")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_contradicting_generation_settings_are_saved_as_they_are(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.generation_config.temperature = 0.6  # without do_sample, as in many a checkpoint on the hub
    settings = llama.generation_config
    with pytest.raises(ValueError, match="temperature"):
        llama.save_pretrained(tmp_path / "transformers")
    save_checkpoint(llama, None, tmp_path / "out")
    assert llama.generation_config is settings
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.6


def test_what_may_be_written_to(llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "pretender").mkdir()
    (tmp_path / "pretender" / saving.MARKER).write_text("[1]")
    check_output(tmp_path / "empty")
    check_output(tmp_path / "new" / "and" / "deep")
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(InputError, match="not a directory one may write to"):
        check_output(tmp_path / "file" / "below")
    for name in ("foreign", "pretender"):
        for overwrite in (False, True):
            with pytest.raises(InputError, match="is not an output of linearpatch"):
                save_checkpoint(llama, None, tmp_path / name, overwrite=overwrite)
    assert os.listdir(tmp_path / "foreign") == ["thesis.tex"]


def test_a_disk_that_is_too_small_is_told_up_front(tmp_path: Path) -> None:
    check_output(tmp_path / "out", 1)
    with pytest.raises(InputError, match=r"needs 1000000\.00 GB and the disk has .* GB free"):
        check_output(tmp_path / "out", 10**15)


def test_an_earlier_output_is_replaced_only_when_asked(llama: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_checkpoint(llama, None, out, extra_files={"old.txt": "old"})
    with pytest.raises(InputError, match="holds an earlier output: pass overwrite=True"):
        save_checkpoint(llama, None, out)
    save_checkpoint(llama, None, out, overwrite=True, extra_files={"new.txt": "new"})
    assert {"new.txt", "config.json"} <= contents(out).keys()
    assert "old.txt" not in contents(out)
    assert os.listdir(tmp_path) == ["out"]


def test_an_earlier_output_is_replaced_where_directories_cannot_be_exchanged(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "_exchanged", lambda *_: False)
    save_checkpoint(llama, None, tmp_path / "out", extra_files={"old.txt": "old"})
    save_checkpoint(llama, None, tmp_path / "out", overwrite=True)
    assert is_ours(tmp_path / "out")
    assert "old.txt" not in contents(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_model_may_be_saved_over_the_checkpoint_it_came_from(ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_patched_model("qwen3")
    save_checkpoint(model, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    save_checkpoint(again, None, tmp_path / "out", overwrite=True)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", ""])
def test_an_extra_file_stays_inside(llama: PreTrainedModel, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="must lie inside"):
        save_checkpoint(llama, None, tmp_path / "out", extra_files={name: "x"})
    assert os.listdir(tmp_path) == []


def test_an_extra_file_that_would_be_read_as_weights_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"taken for weights.*linearpatch/plan\.safetensors"):
        save_checkpoint(llama, None, tmp_path / "out", extra_files={"plan.safetensors": b"x"})
    assert list(tmp_path.iterdir()) == []


def test_files_without_a_model(tmp_path: Path) -> None:
    save_files(tmp_path / "out", {"report.md": "# Report", "plots/a.png": b"\x89"})
    assert contents(tmp_path / "out").keys() == {"report.md", "plots/a.png", saving.MARKER}
    with pytest.raises(InputError, match="earlier output"):
        save_files(tmp_path / "out", {"report.md": "# Another"})


class FullDisk:
    """A tokenizer on which the disk runs full."""

    def save_pretrained(self, directory: Path) -> None:
        assert (Path(directory) / "model.safetensors").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_nothing_is_left_of_a_failed_save(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out could not be written \(No space left on device\)"):
        save_checkpoint(llama, FullDisk(), tmp_path / "out")
    assert os.listdir(tmp_path) == []
    save_checkpoint(llama, None, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="could not be written"):
        save_checkpoint(llama, FullDisk(), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]


def test_the_weights_themselves_do_not_fit(llama: PreTrainedModel, tmp_path: Path) -> None:
    """A limit on the size of a file makes the operating system refuse the weights half-way, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"out could not be written \(.*File too large.*\)"):
            save_checkpoint(llama, None, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", small]).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(InputError, match="GB free"):
            save_checkpoint(llama, None, small / "out")
        monkeypatch.setattr(saving, "_EXTRA_BYTES", -(10**9))  # as if the disk had filled up since the check
        with pytest.raises(InputError, match=r"could not be written \(.*No space left on device.*\)"):
            save_checkpoint(llama, None, small / "out")
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from linearpatch_kernels.files import directories
from linearpatch_kernels.files import directories
from linearpatch_kernels.modeling import saving
from tests.support.tiny import tiny_model

def die(draft, *rest):
    assert (Path(draft) / "model.safetensors").exists()
    os.kill(os.getpid(), signal.SIGKILL)

setattr(directories, sys.argv[2], die)
saving.save_checkpoint(tiny_model("llama", layers=2), None, sys.argv[1], overwrite=True)
"""


def killed_while_saving(target: Path, function: str) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", KILLED, target, function], cwd=root, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_a_kill_leaves_nothing_that_looks_like_a_checkpoint(llama: PreTrainedModel, tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed_while_saving(target, "_flush")
    assert not target.exists()
    save_checkpoint(llama, None, target, extra_files={"first": "1"})
    assert os.listdir(tmp_path) == ["out"]  # the killed run's draft is gone
    before = contents(target)
    killed_while_saving(target, "_put_in_place")
    assert contents(target) == before
    assert len(os.listdir(tmp_path)) == 2
    save_checkpoint(llama, None, target, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_the_draft_of_a_save_that_is_still_running_is_left_alone(llama: PreTrainedModel, tmp_path: Path) -> None:
    running = tmp_path / f".out.linearpatch-{'0' * 32}"
    other = tmp_path / f".other.linearpatch-{'1' * 32}"
    for draft in (running, other):
        draft.mkdir()
        mark(draft, DRAFT)
    lock = os.open(running, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    save_checkpoint(llama, None, tmp_path / "out")
    assert running.exists()
    os.close(lock)
    save_checkpoint(llama, None, tmp_path / "out", overwrite=True)
    assert not running.exists()
    assert other.exists()


def test_what_appears_at_the_place_in_the_meantime_is_kept(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(draft: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()

    monkeypatch.setattr(directories, "_flush", flush)
    with pytest.raises(InputError, match=r"in the meantime.*, and what was finished is kept in .*out\.unfinished"):
        save_checkpoint(llama, None, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out.unfinished")) is type(llama)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.unfinished"]


def test_a_relative_path_and_a_link(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(llama, None, "out")
    (tmp_path / "link").symlink_to("out")
    save_checkpoint(llama, None, "link", overwrite=True, extra_files={"new": "1"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "new").exists()
    assert capsys.readouterr().err == ""


def written_otherwise(model: PreTrainedModel, change: Callable[[Path], object]) -> None:
    """Let `save_pretrained` of this model go wrong silently."""
    save = model.save_pretrained

    def save_pretrained(directory: Path) -> None:
        save(directory)
        change(Path(directory))

    model.save_pretrained = save_pretrained  # type: ignore[assignment]  # as code of others does


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return write


def with_config(**changes: Any) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return write


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
WRITTEN_OTHERWISE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight is missing": (with_tensors(lambda t: t.pop(DOWN)), f"{DOWN} was not written"),
    "a weight too many": (with_tensors(lambda t: t.update(x=torch.ones(2))), "x was written otherwise"),
    "another name": (with_tensors(lambda t: t.update({"base." + DOWN: t.pop(DOWN)})), f"{DOWN} was written otherwise"),
    "another shape": (with_tensors(lambda t: t.update({DOWN: t[DOWN][:-1].clone()})), f"{DOWN} was written otherwise"),
    "another dtype": (with_tensors(lambda t: t.update({DOWN: t[DOWN].bfloat16()})), f"{DOWN} was written otherwise"),
    "one bit": (with_tensors(lambda t: t[DOWN].view(torch.int32)[3, 4].bitwise_xor_(1)), f"{DOWN} was written"),
    "a config of other numbers": (with_config(rms_norm_eps=0.5), "its logits are off"),
    "a config of another depth": (with_config(num_hidden_layers=1), "unexpected keys|logits"),
    "a config of another family": (with_config(model_type="mistral", architectures=["X"]), "loads as a Mistral|logits"),
}


# Without room for a second model, numbers of the config that change no shape are not computed with.
CASES = [(case, room) for case in WRITTEN_OTHERWISE for room in (True, False) if room or "of other numbers" not in case]


@pytest.mark.parametrize(("case", "room"), CASES)
def test_what_was_written_is_read_back(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, room: bool
) -> None:
    change, says = WRITTEN_OTHERWISE[case]
    if not room:
        monkeypatch.setattr(saving, "_free_memory", lambda _: 0)
        if "of other numbers" in case:
            pytest.skip(
                "without room for a second model, numbers of the config that change no shape are not computed with"
            )
        says = says.replace("|logits", "|describes another")
    written_otherwise(llama, change)
    with pytest.raises(InputError, match=f"what was written is not the model in memory: .*({says})"):
        save_checkpoint(llama, None, tmp_path / "out", extra_files={"plan.json": "{}"})
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unfinished" / "plan.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_is_read_back(family: str, tmp_path: Path, dtype: torch.dtype) -> None:
    """Tied and untied heads, per-layer lists, patches: none is taken for a fault; with NaN weights neither."""
    save_checkpoint(tiny_model(family).to(dtype), None, tmp_path / "stock")
    patched = tiny_patched_model(family).to(dtype)
    save_checkpoint(patched, None, tmp_path / "patched")
    with torch.no_grad():
        patched.get_decoder().norm.weight[3] = torch.nan
    save_checkpoint(patched, None, tmp_path / "nan")


def test_companions_stand_beside_the_model_and_replace_nothing(llama: PreTrainedModel, tmp_path: Path) -> None:
    companions = {"LICENSE": b"terms", "config.json": b"{}", "tokenizer.json": b"{}", "notes/NOTICE": b"n"}
    save_checkpoint(llama, tiny_tokenizer(), tmp_path / "out", companions=companions)
    files = contents(tmp_path / "out")
    assert files["LICENSE"] == b"terms"
    assert files["notes/NOTICE"] == b"n"
    assert json.loads(files["config.json"])["model_type"] == "llama"
    assert len(files["tokenizer.json"]) > 100
