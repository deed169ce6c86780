"""``python -m tests.recordings.make``: write down what pruning, merging, sweeping and distilling tiny models give.

The file says per case the SHA-256 of every file's tensors, and figures that a person can read. A change of the code
that is not meant to change results leaves it as it is. One that is meant to writes it anew: the file's difference shows
what it changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainer import Distillation, Step, TrainingSettings, distill
from linearpatch_kernels.merging.settings import VARIANTS
from linearpatch_kernels.nn import DensePatch
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss
from linearpatch_kernels.pruning.fits import FITS
from tests.support.field import cut, linearpatch, save_model, text_file, tiny

FILE = Path(__file__).parent / "recording.json"

LAYERS, JOINT, STEPS, INTERRUPTED_AT = 6, 2, 20, 9
_SMALL = ("--samples", 8, "--length", 16, "--device", "cpu", "--batch-size", 2)
_TRAINING = (
    "--steps",
    STEPS,
    "--length",
    16,
    "--top-k",
    10,
    "--heldout",
    2,
    "--learning-rate",
    2e-3,
    "--device",
    "cpu",
)
# The loss of every model, and its distance to the dense one.
_FIGURES = ("loss", "kl")

Content = dict[str, Any]
"""Of a case: ``bits``, file or tensor -> SHA-256, and ``figures``, name -> number."""


class _Interruption(Exception):
    """What ends a training in the middle."""


def record() -> Content:
    """The recording of this code on this machine, in one thread; what the commands print goes nowhere."""
    nowhere = io.StringIO()
    with (
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        _one_thread(),
        tempfile.TemporaryDirectory() as folder,
    ):
        root = Path(folder)
        return {"machine": machine(), "cases": {name: case(root) for name, case in _cases(root).items()}}


def machine() -> dict[str, str]:
    """What the bits depend on beside our code."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "probe": probe()}


def probe() -> str:
    """How this machine rounds, in 64 hex digits: products, factorisations, transcendental functions, our kernels.

    Nothing of what is recorded takes part in it: it tells machines apart, not versions of the code.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    with _one_thread(), torch.no_grad():
        x, head, square = normal(2, 16, 48), normal(97, 48), normal(48, 48)
        for _ in range(4):
            x = functional.silu(x @ square / 7) + functional.rms_norm(x, [48])
        queries = x.view(2, 16, 4, 12).transpose(1, 2)
        gram = square.double().T @ square.double() + torch.eye(48, dtype=torch.float64)
        values, ids = (x @ head.T).softmax(-1).topk(10)
        return _digest(
            {
                "stream": x,
                "attention": functional.scaled_dot_product_attention(queries, queries, queries, is_causal=True),
                "long": normal(64, 4096) @ normal(4096, 64),
                "cosines": torch.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1).arccos(),
                "solution": torch.linalg.solve(gram, square.double()),
                "eigenvalues": torch.linalg.eigh(gram).eigenvalues,
                "singular values": torch.linalg.svd(square.double()).S,
                "patch": hadamard_patch(x, square[0], down=normal(48, 4), up=normal(4, 48)),
                "loss": linear_topk_kl_loss(x.flatten(0, 1), head, values.flatten(0, 1), ids.flatten(0, 1)),
            }
        )


def _cases(root: Path) -> dict[str, Callable[[Path], Content]]:
    text = text_file(root, 4000)
    dense = {family: save_model(tiny(family), root / family) for family in ("llama", "gemma3_text", "qwen3")}

    def command(name: str, *arguments: object) -> Callable[[Path], Content]:
        def case(root: Path) -> Content:
            output = root / name.replace(" ", "-")
            figures = output.with_suffix(".json")
            error = linearpatch(*arguments, "--text", text, "-o", output, "--json", figures)
            if error is not None:
                raise error
            return _of_output(output, json.loads(figures.read_text()))

        return case

    def prune(fit: str, family: str, *more: object) -> Callable[[Path], Content]:
        return command(f"prune {fit} {family}", "prune", dense[family], "--fit", fit, *more, *_SMALL)

    def merge(name: str, *more: object) -> Callable[[Path], Content]:
        return command(f"merge {name}", "merge", dense["llama"], "--layers", LAYERS - 2, *more, *_SMALL)

    pruned, merged = root / "prune-linearpatch-llama", root / "merge-come"
    teacher = ("--teacher", dense["llama"], "--device", "cpu")
    # Those that came later are left out of `auto`, and so cannot change what was recorded.
    recorded_fits = [name for name, fit in FITS.items() if fit.automatic]
    cases = {f"prune {fit}": prune(fit, "llama", "--spans", "2:4", *_rank(fit)) for fit in recorded_fits}
    cases["prune auto, by loss"] = prune("auto", "llama", "--drop", 2, "--score", "loss", "--rank", 4)
    # Layers of two kinds of attention; norms of queries and keys; two joints, with layers between them.
    cases["prune gemma"] = prune("auto", "gemma3_text", "--spans", "1:2,3:5", "--rank", 4)
    cases["prune qwen"] = prune("low-rank", "qwen3", "--drop", 1, "--rank", 4)
    for variant in VARIANTS:
        cases[f"merge {variant}"] = merge(variant, "--variant", variant)
    cases["merge, patched"] = merge("patched", "--variant", "come", "--heal", "low-rank", "--rank", 4)
    cases["sweep"] = command("sweep", "sweep", dense["llama"], "--drop", "1-3", "--rank", 4, "--windows", 2, *_SMALL)
    cases["distill straight"] = lambda root: _trained(root / "straight")
    cases["distill interrupted"] = lambda root: _trained(root / "interrupted", interrupted=True)
    structured = ("--patch", "dense", "--structured", 3)
    cases["distill structured"] = command("structured", "distill", pruned, *teacher, *structured, *_TRAINING)
    groups = ("--group-steps", 4)
    cases["distill merged"] = command("distilled", "distill", merged, *teacher, *groups, *_TRAINING)
    return cases


def _rank(fit: str) -> tuple[object, ...]:
    return ("--rank", 4) if "low-rank" in fit else ()


def _trained(folder: Path, *, interrupted: bool = False) -> Content:
    """A dense patch, trained in one go or in two."""
    dense = tiny("llama")
    windows = torch.randint(3, 97, (12, 20), generator=torch.Generator().manual_seed(0))
    store = write_teacher_store(dense, windows, folder / "store", top_k=10, depths=(JOINT, 4), shard_windows=5)
    if interrupted:
        with contextlib.suppress(_Interruption):
            _train(dense, store, folder, stop=INTERRUPTED_AT)
    student, run = _train(dense, store, folder)
    bits = {"student": _digest(student.state_dict()), **_bits_below(folder / "store")}
    figures = {f"held out, step {point['step']:g}": point["tail"] for point in run.curve}
    return {"bits": bits, "figures": figures | {f"loss, step {line['step']}": line["loss"] for line in run.log}}


def _train(dense: Any, store: TeacherStore, folder: Path, *, stop: int | None = None) -> tuple[Any, Distillation]:
    student = cut(dense, {JOINT: DensePatch(dense.config.hidden_size)})

    def on_step(step: Step) -> None:
        if step.done == stop:
            raise _Interruption

    run = distill(
        student,
        store,
        joint=JOINT,
        training=range(9),
        heldout=range(9, 12),
        settings=TrainingSettings(steps=STEPS, train="patch+norms", windows_per_step=2, learning_rate=2e-3),
        directory=folder / "run",
        checkpoint_seconds=0.0,
        on_step=on_step,
    )
    return student, run


def _of_output(output: Path, told: Mapping[str, Any]) -> Content:
    """What a command wrote: the tensors of its files, and the figures that it told."""
    figures = {
        f"{model}, {figure}": quality[figure]
        for model, quality in _qualities(told)
        for figure in _FIGURES
        if quality.get(figure) is not None
    }
    for point in told.get("distillation", {}).get("curve", ()):
        figures[f"held out, step {point['step']:g}"] = point["tail"]
    return {"bits": _bits_below(output), "figures": figures}


def _qualities(told: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if "quality" in told:
        yield from told["quality"].items()
    for point in told.get("points", ()):
        yield f"{point['drop']} layers dropped, {point['fit']}", point


def _bits_below(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): _digest(load_file(path)) for path in files}


# A joint's only patch, in a checkpoint and in a plan.
_FIRST_PATCH = re.compile(r"(?P<chain>(?:.*\.(?:output_)?patch|joint\.\d+:\d+)\.)0\.(?P<rest>.+)")


def _recorded_name(name: str, names: Collection[str]) -> str:
    """What a tensor was called at the recording, when the only patch of a joint had no number yet."""
    found = _FIRST_PATCH.fullmatch(name)
    alone = found is not None and not any(other.startswith(f"{found['chain']}1.") for other in names)
    return f"{found['chain']}{found['rest']}" if found and alone else name


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and bytes."""
    state = hashlib.sha256()
    recorded = {_recorded_name(name, tensors): tensor for name, tensor in tensors.items()}
    for name, tensor in sorted(recorded.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, since numpy has no bfloat16.
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are split among threads, and so rounded in an order that depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    content = record()
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    files = sum(len(case["bits"]) for case in content["cases"].values())
    figures = sum(len(case["figures"]) for case in content["cases"].values())
    print(f"{FILE.name}: {len(content['cases'])} cases, {files} files' bits, {figures} figures")


if __name__ == "__main__":
    main()
