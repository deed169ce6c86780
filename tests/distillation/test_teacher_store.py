"""The teacher's answers on disk: what they are, how they survive, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels import fingerprints
from linearpatch_kernels.distillation import teacher_store
from linearpatch_kernels.distillation.teacher_store import STORE_FILES, TeacherStore, store_request, write_teacher_store
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import working_alone
from linearpatch_kernels.forward import residual_stream
from tests.support.tiny import FAMILY_NAMES, tiny_model


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(action: Callable[[], object]) -> str:
    """The one line of the refusal."""
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copy(store: TeacherStore, tmp_path: Path) -> Path:
    """A store that a test may break."""
    return Path(shutil.copytree(store.directory, tmp_path / "copy"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_kept_is_what_the_model_says(family: str, windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    store = write_teacher_store(model, windows[:3], tmp_path / "store", top_k=10, depths=[6, 2], shard_windows=2)
    with torch.no_grad():
        logits = model(windows[:3]).logits.double()
        state = model.model(windows[:3], output_hidden_states=True).hidden_states[2]
        end = residual_stream(model, windows[:3], [6])[6]
    probs, ids = logits.softmax(-1).topk(10)
    batch = store.batch([0, 1, 2], [2, 3, 6])
    assert torch.equal(batch.input_ids, windows[:3])
    torch.testing.assert_close(batch.probs.double(), probs, rtol=2e-3, atol=1e-7)
    assert (batch.ids == ids).double().mean() > 0.99  # a rounding may exchange two that are equally likely
    # The mass of the ten is kept in float32, however fp16 rounded each of them.
    torch.testing.assert_close(batch.probs.double().sum(-1), probs.sum(-1), rtol=1e-5, atol=1e-6)
    assert list(batch.states) == [2, 6]
    torch.testing.assert_close(batch.states[2].float(), state, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(batch.states[6].float(), end, rtol=1e-2, atol=1e-3)
    assert store.batch([0]).states == {}
    again = store.batch([2, 0])
    assert torch.equal(again.ids, batch.ids[[2, 0]])
    assert torch.equal(again.probs, batch.probs[[2, 0]])


def test_the_size_is_what_was_told(dense: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    for depths in ([], [2], [0, 5, 6]):
        request = store_request(dense, windows, top_k=10, depths=depths, shard_windows=6)
        place = tmp_path / str(len(depths))
        store = write_teacher_store(dense, windows, place, top_k=10, depths=depths, shard_windows=6)
        written = sum(path.stat().st_size for path in store.directory.glob("shard-*"))
        assert request.bytes_per_token == 10 * 4 + 2 + 4 + 2 * 48 * len(depths)
        assert 0 <= written - request.total_bytes < 4096
    assert request.shards == [("shard-00000.safetensors", slice(0, 6)), ("shard-00001.safetensors", slice(6, 12))]


def test_a_large_vocabulary_takes_four_bytes_an_id(windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama", layers=2, vocab_size=70_000)
    with torch.no_grad():
        model.lm_head.weight[69_999] = 20 * model.lm_head.weight[69_998]
    store = write_teacher_store(model, windows[:2], tmp_path / "store", top_k=4)
    assert store.request.ids_dtype == torch.int32
    batch = store.batch([0, 1])
    assert int(batch.ids.max()) == 69_999
    with torch.no_grad():
        assert torch.equal(batch.ids[..., 0].long(), model(windows[:2]).logits.argmax(-1))


def test_batches_do_not_change_what_is_kept(dense: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    one = write_teacher_store(dense, windows, tmp_path / "one", top_k=10)
    four = write_teacher_store(dense, windows, tmp_path / "four", top_k=10, shard_windows=7, batch_size=4)
    for window in (0, 6, 7, 11):
        torch.testing.assert_close(one.batch([window]).probs, four.batch([window]).probs, rtol=2e-3, atol=1e-6)


def test_nothing_is_asked_twice(
    dense: PreTrainedModel, windows: Tensor, store: TeacherStore, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    answers = teacher_store.teacher_answers
    monkeypatch.setattr(teacher_store, "teacher_answers", lambda *a: asked.append(len(a[1])) or answers(*a))
    write_teacher_store(dense, windows, copy, top_k=10, shard_windows=5)
    assert asked == []
    (copy / "index.json").unlink()
    (copy / "shard-00001.safetensors").unlink()
    again = write_teacher_store(dense, windows, copy, top_k=10, shard_windows=5)
    assert sum(asked) == 5
    assert again.repaired == ()
    assert contents(copy) == contents(store.directory)


@pytest.mark.parametrize("harm", ["flip-header", "flip-data", "flip-last", "truncate", "empty", "swap", "grow"])
def test_a_damaged_shard_is_refused_and_written_again(
    dense: PreTrainedModel, windows: Tensor, store: TeacherStore, copy: Path, harm: str
) -> None:
    shard = copy / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    places = {"flip-header": 200, "flip-data": len(content) // 2, "flip-last": len(content) - 1}
    if harm in places:
        content[places[harm]] ^= 1
    elif harm == "truncate":
        del content[-100:]
    elif harm == "empty":
        content.clear()
    elif harm == "grow":
        content += b"0"
    else:
        content = bytearray((copy / "shard-00000.safetensors").read_bytes())
    shard.write_bytes(content)
    said = refused(lambda: TeacherStore.open(copy))
    assert "shard-00001.safetensors" in said
    again = write_teacher_store(dense, windows, copy, top_k=10, shard_windows=5)
    assert again.repaired == ("shard-00001.safetensors",)
    assert contents(copy) == contents(store.directory)


def test_every_flipped_byte_of_a_header_is_noticed(copy: Path) -> None:
    shard = copy / "shard-00000.safetensors"
    content = shard.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for place in range(0, end, 7):
        harmed = bytearray(content)
        harmed[place] ^= 2
        shard.write_bytes(harmed)
        assert "shard-00000" in refused(lambda: TeacherStore.open(copy)), place


def test_stores_that_are_not_whole(copy: Path, tmp_path: Path) -> None:
    assert "is not a teacher store" in refused(lambda: TeacherStore.open(tmp_path / "nothing"))
    index = (copy / "index.json").read_bytes()
    (copy / "index.json").write_bytes(index[:-20])
    assert "index.json is damaged" in refused(lambda: TeacherStore.open(copy))
    (copy / "index.json").unlink()
    assert "not complete" in refused(lambda: TeacherStore.open(copy))
    (copy / "index.json").write_bytes(index)
    (copy / "shard-00002.safetensors").unlink()
    assert "shard-00002.safetensors is missing" in refused(lambda: TeacherStore.open(copy))
    request = json.loads((copy / "request.json").read_bytes())
    (copy / "request.json").write_text(json.dumps({**request, "top_k": 9}))
    assert "belongs to another store" in refused(lambda: TeacherStore.open(copy))
    (copy / "request.json").write_text(json.dumps({**request, "version": 1}))
    assert "not of this version" in refused(lambda: TeacherStore.open(copy))
    (copy / "request.json").write_text("[]")
    assert "damaged" in refused(lambda: TeacherStore.open(copy))


def test_foreign_stores_and_directories(dense: PreTrainedModel, windows: Tensor, copy: Path, tmp_path: Path) -> None:
    def write(model: PreTrainedModel = dense, ids: Tensor = windows, **changes: object) -> str:
        arguments = {"top_k": 10, "shard_windows": 5, **changes}
        return refused(lambda: write_teacher_store(model, ids, copy, **arguments))

    before = contents(copy)
    assert "another teacher" in write(tiny_model("llama", seed=1))
    assert "another tokenizer" in write(tokenizer="0123456789abcdef")
    assert "other text" in write(ids=windows.flip(0))
    assert "other text" in write(ids=windows[:6])
    assert "another `top_k`" in write(top_k=9)
    assert "states of other depths" in write(depths=[2])
    assert contents(copy) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "is not a teacher store" in refused(lambda: write_teacher_store(dense, windows, tmp_path / "mine", top_k=10))
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]
    with working_alone(copy, STORE_FILES):
        assert "another process works" in write()


def test_a_student_that_cannot_learn_from_it(
    dense: PreTrainedModel, windows: Tensor, tmp_path: Path, store: TeacherStore
) -> None:
    assert "vocabulary" in refused(lambda: store.check(tiny_model("llama", layers=2, vocab_size=96)))
    named = write_teacher_store(dense, windows[:2], tmp_path / "named", top_k=3, tokenizer="a" * 16, depths=[2])
    named.check(dense, tokenizer="a" * 16)
    assert "another tokenizer" in refused(lambda: named.check(dense, tokenizer="b" * 16))
    wide = tiny_model("llama", layers=2, hidden_size=64)
    assert "width 48, the model 64" in refused(lambda: named.check(wide))


def test_requests_that_make_no_sense(dense: PreTrainedModel, windows: Tensor) -> None:
    for top_k in (0, 98):
        assert "`top_k`" in refused(lambda k=top_k: store_request(dense, windows, top_k=k))
    assert "no depth 7" in refused(lambda: store_request(dense, windows, depths=[7]))
    assert "token id 97" in refused(lambda: store_request(dense, windows + 97 - windows.max()))


def test_a_teacher_that_is_broken(windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight[5, 3] = torch.nan
    said = refused(lambda: write_teacher_store(model, windows, tmp_path / "store", top_k=10))
    assert "not finite" in said
    assert sorted(os.listdir(tmp_path / "store")) == ["request.json"]


def test_a_disk_that_is_too_small_is_told_up_front(
    dense: PreTrainedModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    said = refused(lambda: write_teacher_store(dense, windows, tmp_path / "store", top_k=10))
    assert "46 MB per million tokens" in said
    assert not (tmp_path / "store").exists()


def test_a_disk_that_fills_up_keeps_what_is_whole(
    dense: PreTrainedModel, windows: Tensor, tmp_path: Path, store: TeacherStore
) -> None:
    """A limit on the size of a file makes the operating system refuse the second shard, which is larger."""
    place = tmp_path / "store"
    small = (store.directory / "shard-00002.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small + 500, limits[1]))
    try:
        said = refused(lambda: write_teacher_store(dense, windows, place, top_k=10, shard_windows=5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written (File too large): make room" in said
    assert os.listdir(place) == ["request.json"]
    write_teacher_store(dense, windows, place, top_k=10, shard_windows=5)
    assert contents(place) == contents(store.directory)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_next_tokens_mixed_in(store: TeacherStore, weight: float) -> None:
    batch = store.batch([0, 4, 7])
    mixed = batch.with_labels(weight)
    assert torch.equal(mixed.input_ids, batch.input_ids)
    outside = 0
    for window in range(3):
        for position in range(20):
            ids, probs = batch.ids[window, position].tolist(), batch.probs[window, position].tolist()
            wanted = {i: (1 - weight) * p for i, p in zip(ids, probs, strict=True)}
            if position == 19:
                wanted = dict(zip(ids, probs, strict=True))
            else:
                label = int(batch.input_ids[window, position + 1])
                if label not in wanted:
                    outside += 1
                    del wanted[ids[probs.index(min(probs))]]
                wanted[label] = wanted.get(label, 0.0) + weight
            found = dict(zip(mixed.ids[window, position].tolist(), mixed.probs[window, position].tolist(), strict=True))
            assert found == pytest.approx(wanted, rel=1e-6, abs=1e-8)
    assert 0 < outside < 57
    assert torch.equal(batch.probs, store.batch([0, 4, 7]).probs)  # what was read is as it was
    assert batch.with_labels(0) is batch


def test_a_store_of_version_0_1_is_gone_on_with(
    dense: PreTrainedModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprints were other ones; they are compared with what that version would have written today."""
    with monkeypatch.context() as earlier:
        earlier.setattr(teacher_store, "fingerprint_model", fingerprints._fingerprint_0_1)
        old = write_teacher_store(dense, windows, tmp_path, top_k=10, shard_windows=5, tokenizer="0123456789abcdef")
    before = contents(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "index.json").unlink()
    today = "01234567-0123456789abcdef"
    store = write_teacher_store(dense, windows, tmp_path, top_k=10, shard_windows=5, tokenizer=today)
    assert store.request == old.request
    assert contents(tmp_path) == before
    store.check(dense, tokenizer=today)
    arguments = {"top_k": 10, "shard_windows": 5, "tokenizer": today}
    changed = tiny_model("llama", seed=1)
    assert "another teacher" in refused(lambda: write_teacher_store(changed, windows, tmp_path, **arguments))
    assert "other text" in refused(lambda: write_teacher_store(dense, windows.flip(0), tmp_path, **arguments))
