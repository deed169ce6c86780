"""What the teacher says about a text, computed once and kept: per token its K likeliest tokens with their true
probabilities, and on request its hidden states at some depths.

A store is a directory: ``request.json`` (whose answers, on what; written first), ``shard-00000.safetensors`` and so on,
``index.json`` (the shards with their checksums; written last, so that its presence means: complete). Shard by shard it
appears whole or not at all: a killed writer goes on where it was, and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import (
    MARKER,
    Entries,
    final_name,
    read_json,
    read_seal,
    reading,
    working_alone,
    write_sealed,
    write_whole,
)
from linearpatch_kernels.fingerprints import fingerprint_model, fingerprint_windows, model_difference, same_tokenizer
from linearpatch_kernels.forward import PartialRun, Progress, Run, check_windows, residual_stream
from linearpatch_kernels.modeling.families import hidden_size, num_layers, text_config
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.torch_state import eval_mode, own_state

DEFAULT_TOP_K = 50

_FORMAT = "linearpatch-teacher-store"
_VERSION = 2
_SIZES = ("count", "length", "vocabulary", "hidden_size", "top_k", "shard_windows")
_LARGEST_SIZE = 1 << 40
_SHARD_BYTES = 64 << 20
STORE_FILES = re.compile(r"request\.json|index\.json|shard-\d{5}\.safetensors")
"""What a store is made of."""
# Logits that exist at once while the store is written: 64 MB of float32, whatever the vocabulary.
_LOGITS_AT_ONCE = 1 << 24


@dataclasses.dataclass(frozen=True)
class StoreRequest:
    """Whose answers a store holds, and on what; two stores of the same request hold the same bytes.

    Attributes:
        model, tokenizer, windows: fingerprints of the teacher, its tokenizer ("" if not told) and the token ids.
        count, length: windows, and tokens in each.
        vocabulary, hidden_size: of the teacher.
        top_k: K.
        depths: whose hidden states are kept too, increasing (depth i is the stream entering layer i, or behind all).
        shard_windows: windows in a shard.
    """

    model: str
    tokenizer: str
    windows: str
    count: int
    length: int
    vocabulary: int
    hidden_size: int
    top_k: int
    depths: tuple[int, ...]
    shard_windows: int

    def __post_init__(self) -> None:
        sizes = (self.count, self.length, self.vocabulary, self.hidden_size, self.top_k, self.shard_windows)
        if min(sizes) < 1 or self.top_k > self.vocabulary or list(self.depths) != sorted({*self.depths}):
            raise InputError(
                f"a teacher store of {self.count} windows of {self.length} tokens, in shards of {self.shard_windows}, "
                f"with `top_k` {self.top_k} of {self.vocabulary} and the depths {list(self.depths)} makes no sense: "
                "every number must be at least 1, and the depths must increase"
            )

    @property
    def ids_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensor name -> dtype and shape behind [windows, length]: what a shard holds."""
        kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "input_ids": (self.ids_dtype, ()),
            "ids": (self.ids_dtype, (self.top_k,)),
            "probs": (torch.float16, (self.top_k,)),
            "kept_mass": (torch.float32, ()),
        }
        return kept | {_state(depth): (torch.bfloat16, (self.hidden_size,)) for depth in self.depths}

    @property
    def bytes_per_token(self) -> int:
        return sum(dtype.itemsize * (shape[0] if shape else 1) for dtype, shape in self.layout.values())

    @property
    def total_bytes(self) -> int:
        """Of all shards but for their headers."""
        return self.bytes_per_token * self.count * self.length

    @property
    def shards(self) -> list[tuple[str, slice]]:
        """File name and windows of every shard."""
        starts = range(0, self.count, self.shard_windows)
        return [
            (f"shard-{i:05}.safetensors", slice(s, min(s + self.shard_windows, self.count)))
            for i, s in enumerate(starts)
        ]

    def to_json(self) -> dict[str, Any]:
        return {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(self), "depths": list(self.depths)}

    @classmethod
    def read(cls, file: Path) -> StoreRequest:
        """InputError where the file is not what a writer of this version wrote."""
        if not file.exists():
            raise InputError(f"{file.parent} is not a teacher store: it has no {file.name}")
        cure = "give another `store`"
        content = read_json(file, f"it is damaged or not of this version, so {cure}")
        if content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise InputError(f"{file} is damaged or not of this version: {cure}")
        with reading(file, cure):
            told = Entries(content)
            entries: dict[str, Any] = {name: told.text(name) for name in ("model", "tokenizer", "windows")}
            entries |= {name: told.whole(name, 1, _LARGEST_SIZE) for name in _SIZES}
            return cls(**entries, depths=tuple(told.listed("depths").wholes(most=_LARGEST_SIZE)))


def _state(depth: int) -> str:
    return f"state.{depth}"


def store_request(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    top_k: int = DEFAULT_TOP_K,
    depths: Sequence[int] = (),
    tokenizer: str = "",
    shard_windows: int | None = None,
) -> StoreRequest:
    """The request for the answers of ``model`` on ``windows`` [W, T]; shards of about 64 MB unless told.

    Raises:
        InputError: windows that do not fit the model, a ``top_k`` outside the vocabulary, depths outside the layers.
    """
    check_windows(model, windows)
    vocabulary, layers = int(text_config(model.config).vocab_size), num_layers(model)
    if not 1 <= top_k <= vocabulary:
        raise InputError(f"`top_k` {top_k} is not between 1 and the vocabulary's {vocabulary} tokens")
    for depth in depths:
        if not 0 <= depth <= layers:
            raise InputError(f"there is no depth {depth} in a model of {layers} layers")
    request = StoreRequest(
        model=fingerprint_model(model),
        tokenizer=tokenizer,
        windows=fingerprint_windows(windows),
        count=len(windows),
        length=windows.shape[1],
        vocabulary=vocabulary,
        hidden_size=hidden_size(model),
        top_k=top_k,
        depths=tuple(sorted(set(depths))),
        shard_windows=shard_windows or 1,
    )
    fitting = max(1, _SHARD_BYTES // (request.bytes_per_token * request.length))
    return dataclasses.replace(request, shard_windows=shard_windows or fitting)


@own_state()
def write_teacher_store(
    model: PreTrainedModel,
    windows: Tensor,
    directory: str | Path,
    *,
    top_k: int = DEFAULT_TOP_K,
    depths: Sequence[int] = (),
    tokenizer: str = "",
    shard_windows: int | None = None,
    batch_size: int = 1,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> TeacherStore:
    """One pass of the dense model over ``windows`` [W, T]; what an earlier call for the same finished is not repeated.

    A token takes ``K * (2 + ids) + ids + 4`` bytes, ids being 2 up to 65,536 tokens of vocabulary, else 4, and ``2 d``
    more per depth whose state is kept: for K = 50 and a small vocabulary 206 MB per million tokens. A damaged shard is
    written again (`TeacherStore.repaired` names it). Memory beyond the decoder's pass over a batch: 64 MB of logits,
    their Top-K, and one shard.

    Args:
        model: the teacher.
        depths: keep the hidden states at these depths too, in bfloat16.
        tokenizer: fingerprint of the tokenizer that made the windows (`fingerprints.fingerprint_tokenizer`).
        shard_windows: windows in a shard; None: about 64 MB of them.
        batch_size: windows per forward pass.
        processes: several share the shards out among them; all return the whole store.
        progress: called after each batch.

    Raises:
        InputError: a directory with another store or other things in it, a disk that is too small or becomes full,
            logits that are not finite, or what `store_request` raises.
    """
    processes = processes or Processes()
    folder = Path(directory).expanduser()
    request = store_request(
        model, windows, top_k=top_k, depths=depths, tokenizer=tokenizer, shard_windows=shard_windows
    )
    if not processes.first:
        processes.wait()
        request = _as_there(request, model, folder)
        _write_shards(model, windows, folder, request, Run(batch_size, processes))
        processes.wait()
        processes.wait()
        return TeacherStore.open(folder)
    request = _as_there(request, model, folder)
    repaired = [] if _check_folder(folder, request) else ["request.json"]
    with working_alone(folder, STORE_FILES):
        if repaired or not (folder / "request.json").exists():
            write_whole(folder / "request.json", _json(request.to_json()))
        processes.wait()
        repaired += _write_shards(model, windows, folder, request, Run(batch_size, processes, progress))
        processes.wait()
        index, listed = (
            folder / "index.json",
            _json({"shards": {n: read_seal(folder / n)[1] for n, _ in request.shards}}),
        )
        if not index.exists() or index.read_bytes() != listed:
            write_whole(index, listed)
        processes.wait()
    return dataclasses.replace(TeacherStore.open(folder), repaired=tuple(repaired))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _as_there(request: StoreRequest, model: PreTrainedModel, folder: Path) -> StoreRequest:
    """The request with the fingerprints of the store in this folder, where an earlier version wrote them and they are
    of this teacher and tokenizer all the same."""
    if not (folder / "request.json").exists():
        return request
    try:
        there = StoreRequest.read(folder / "request.json")
    except InputError:  # `_check_folder` decides about it
        return request
    same_model = not model_difference(there.model, model)
    same = same_tokenizer(there.tokenizer, request.tokenizer)
    return dataclasses.replace(
        request,
        model=there.model if same_model else request.model,
        tokenizer=there.tokenizer if same else request.tokenizer,
    )


def _check_folder(folder: Path, request: StoreRequest) -> bool:
    """InputError where the store of this request cannot be written to, and is not in, this folder.

    Returns:
        Whether its request, if it is there, is sound.
    """
    sound = True
    if folder.is_dir() and not all(_may_be_begun(path.name) for path in folder.iterdir()):
        if not (folder / "request.json").exists():
            raise InputError(f"{folder} exists and is not a teacher store: give another `store`")
        try:
            found = StoreRequest.read(folder / "request.json")
        except InputError:
            # Every shard says whose it is, too.
            sound = False
            if not any(_is_sound(folder / name, request) for name, _ in request.shards):
                raise
        else:
            _check_same(found, request, folder)
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    present = sum((folder / name).stat().st_size for name, _ in request.shards if (folder / name).exists())
    needed, free = request.total_bytes - present, shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"the teacher store takes {request.total_bytes / 1e9:.3f} GB ({request.bytes_per_token} MB per million "
            f"tokens) and {parent} has {free / 1e9:.3f} GB free: make room, give another `store`, a smaller `top_k`, "
            "or less text"
        )
    return sound


def _may_be_begun(name: str) -> bool:
    """Whether a directory with a file of this name may still become a store: our marker, an unfinished file of ours."""
    return name == MARKER or (name != final_name(name) and STORE_FILES.fullmatch(final_name(name)) is not None)


_WHOSE = {
    "model": "another teacher",
    "tokenizer": "another tokenizer",
    "vocabulary": "another vocabulary",
    "hidden_size": "another teacher",
    "windows": "other text",
    "count": "other text",
    "length": "windows of another length",
    "top_k": "another `top_k`",
    "depths": "the states of other depths",
    "shard_windows": "shards of another size",
}


def _check_same(found: StoreRequest, wanted: StoreRequest, folder: Path) -> None:
    for name, whose in _WHOSE.items():
        there, here = getattr(found, name), getattr(wanted, name)
        if there != here:
            raise InputError(
                f"{folder} is a teacher store of {whose} ({name} {there} there, {here} here): give another `store`, or "
                "delete it"
            )


def _write_shards(model: PreTrainedModel, windows: Tensor, folder: Path, request: StoreRequest, run: Run) -> list[str]:
    """This process's share of the shards that are not there or damaged; returns the damaged ones."""
    damaged = []
    mine = request.shards[run.processes.rank :: run.processes.count]
    total = sum(part.stop - part.start for _, part in mine)
    done = 0
    for name, part in mine:
        exists = (folder / name).exists()
        if not exists or not _is_sound(folder / name, request):
            damaged += [name] * exists
            states = []
            for batch in windows[part].split(run.batch_size):
                states.append(teacher_answers(model, batch, request))
                run.report("asking the teacher", done + sum(len(s["input_ids"]) for s in states), total)
            shard = {key: torch.cat([state[key] for state in states]) for key in request.layout}
            write_sealed(folder / name, shard, {"request": request.to_json(), "shard": name})
        done += part.stop - part.start
        run.report("asking the teacher", done, total)
    return damaged


def _is_sound(file: Path, request: StoreRequest) -> bool:
    try:
        _check_shard(file, request, read_seal(file)[1])
    except InputError:
        return False
    return True


def _check_shard(file: Path, request: StoreRequest, listed: Any) -> None:
    """InputError where a shard is damaged, of another store, not the one ``listed``, or not of its windows' shapes."""
    about, digest = read_seal(file)
    if about != {"request": request.to_json(), "shard": file.name} or listed != digest:
        raise InputError(f"{file} belongs to another store: delete it and write the store again")
    part = dict(request.shards)[file.name]
    wanted = {name: [part.stop - part.start, request.length, *shape] for name, (_, shape) in request.layout.items()}
    with reading(file, "delete it and write the store again"), safe_open(file, framework="pt") as shard:
        there = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118 (not a mapping)
        if there != wanted:
            raise ValueError(f"it holds {there} and should hold {wanted}")


@torch.no_grad()
def teacher_answers(model: PreTrainedModel, windows: Tensor, request: StoreRequest) -> dict[str, Tensor]:
    """What a store keeps of ``windows`` [B, T], on the CPU: `StoreRequest.layout` says what, and as what.

    Equivalent to ``model(windows).logits.float().softmax(-1).topk(request.top_k)``.

    Raises:
        InputError: logits that are not finite.
    """
    layers = num_layers(model)
    with eval_mode(model):
        states = residual_stream(model, windows, sorted({layers, *request.depths}))
        head = PartialRun(model, layers, "logits")
        step = max(1, _LOGITS_AT_ONCE // (request.vocabulary * len(windows)))
        parts = [_likeliest(head(part), request.top_k) for part in states[layers].split(step, dim=1)]
    probs, ids = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
    mass = probs.double().sum(-1)
    if not bool(mass.isfinite().all()):
        raise InputError("the teacher gives logits that are not finite: load it in bfloat16 or float32")
    answers = {"input_ids": windows, "ids": ids, "probs": probs, "kept_mass": mass}
    answers |= {_state(depth): states[depth] for depth in request.depths}
    return {name: tensor.to("cpu", request.layout[name][0]) for name, tensor in answers.items()}


def _likeliest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    values, ids = logits.topk(top_k)
    # Relative to the largest: a sum of logarithms of thousands would have lost the digits that tell them apart.
    largest = values[..., :1]
    return (values - largest).exp() / (logits - largest).exp_().sum(-1, keepdim=True), ids


class TeacherBatch(NamedTuple):
    """Some windows of a store.

    Attributes:
        input_ids: [B, T] int64.
        probs: [B, T, K] float32, the teacher's true probabilities (their sum is the kept mass).
        ids: [B, T, K] int32.
        states: depth -> [B, T, d] bfloat16.
    """

    input_ids: Tensor
    probs: Tensor
    ids: Tensor
    states: dict[int, Tensor]

    def with_labels(self, weight: float) -> TeacherBatch:
        """The answers mixed with the text's own next tokens: (1 - weight) p + weight [is the next token].

        The last position of a window has no next token and keeps the teacher's. A next token that is not among the K
        takes the place of the least likely of them.
        """
        if weight == 0:
            return self
        labels = self.input_ids[:, 1:, None].to(self.ids.dtype)
        probs, ids = self.probs.clone(), self.ids.clone()
        before = probs[:, :-1], ids[:, :-1]
        missing = (before[1] != labels).all(-1, keepdim=True)
        last = torch.arange(ids.shape[-1], device=ids.device) == before[0].argmin(-1, keepdim=True)
        replaced = missing & last
        before[1].copy_(torch.where(replaced, labels, before[1]))
        before[0].masked_fill_(replaced, 0).mul_(1 - weight).add_((before[1] == labels).to(probs), alpha=weight)
        return self._replace(probs=probs, ids=ids)


@dataclasses.dataclass(frozen=True)
class TeacherStore:
    """A complete store on disk; nothing of it is held in memory.

    Attributes:
        directory: where it is.
        request: whose answers it holds, and on what.
        repaired: files that the writer found damaged and wrote again.
    """

    directory: Path
    request: StoreRequest
    repaired: tuple[str, ...] = ()

    @classmethod
    def open(cls, directory: str | Path) -> TeacherStore:
        """Read every byte once and compare it with the checksums.

        Raises:
            InputError: no store, not complete, a shard that is missing, truncated, changed or of another store.
        """
        folder = Path(directory).expanduser()
        request = StoreRequest.read(folder / "request.json")
        if not (folder / "index.json").exists():
            raise InputError(f"the teacher store {folder} is not complete: write it again to go on")
        cure = "index.json is damaged, so delete it and write the store again"
        index = read_json(folder / "index.json", cure)
        with reading(folder / "index.json", cure):
            listed = Entries(index).table("shards")
        # Counted before they are named: the request may tell of any number.
        if len(listed) != -(-request.count // request.shard_windows):
            raise InputError(
                f"{folder} lists {len(listed)} shards and needs others: delete it and write the store again"
            )
        for name, _ in request.shards:
            _check_shard(folder / name, request, listed.get(name))
        return cls(folder, request)

    def check_windows(self, windows: Sequence[int]) -> None:
        """InputError where the store has no windows of these numbers."""
        beyond = [window for window in windows if not 0 <= window < self.request.count]
        if beyond:
            raise InputError(f"the teacher store has {self.request.count} windows and none of number {beyond[0]}")

    def check(self, model: PreTrainedModel, *, tokenizer: str = "") -> None:
        """InputError where a student with another vocabulary or width, or another tokenizer, would learn from it."""
        if int(text_config(model.config).vocab_size) != self.request.vocabulary:
            raise InputError(
                f"the teacher store has a vocabulary of {self.request.vocabulary} tokens and the model "
                f"{text_config(model.config).vocab_size}: they need the same"
            )
        if tokenizer and self.request.tokenizer and not same_tokenizer(tokenizer, self.request.tokenizer):
            raise InputError("the teacher store was made with another tokenizer: teacher and student need the same")
        if self.request.depths and hidden_size(model) != self.request.hidden_size:
            raise InputError(
                f"the states in the store have width {self.request.hidden_size}, the model {hidden_size(model)}"
            )

    @own_state()
    def batch(self, windows: Sequence[int], depths: Sequence[int] = ()) -> TeacherBatch:
        """The answers on these windows (numbers from 0), on the CPU; states only of those ``depths`` that are kept.

        InputError for a window that is not there.
        """
        self.check_windows(windows)
        kept = [depth for depth in self.request.depths if depth in depths]
        left_out = {_state(depth) for depth in self.request.depths if depth not in depths}
        names = [name for name in self.request.layout if name not in left_out]
        rows = [self._window(window, names) for window in windows]
        parts = {name: torch.cat([row[name] for row in rows]) for name in names}
        probs = parts["probs"].float()
        # fp16 rounds each probability; the recorded mass keeps what they leave to the rest of the vocabulary exact.
        probs *= (parts["kept_mass"] / probs.sum(-1)).unsqueeze(-1)
        return TeacherBatch(
            parts["input_ids"].to(torch.int64),
            probs,
            parts["ids"].to(torch.int32),
            {depth: parts[_state(depth)] for depth in kept},
        )

    def _window(self, window: int, names: Sequence[str]) -> dict[str, Tensor]:
        shard, row = divmod(window, self.request.shard_windows)
        with safe_open(self.directory / self.request.shards[shard][0], framework="pt") as file:
            return {name: file.get_slice(name)[row : row + 1] for name in names}
