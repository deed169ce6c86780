"""Run by engines.py in vLLM's own environment: what vLLM writes for checkpoints, and how fast.

``in_vllm.py JOB RESULTS``: two JSON files. It may import nothing of this project.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def measured(job: dict[str, Any], directory: str, options: dict[str, Any]) -> dict[str, Any]:
    """The tokens after every prompt, and seconds: of reading a prompt, and of writing after one."""
    from vllm import LLM, SamplingParams

    prompt, new, repeats = job["prompt_tokens"], job["new_tokens"], job["repeats"]
    llm = LLM(
        model=directory,
        dtype="float32",
        max_model_len=prompt + new + 1,
        max_num_seqs=8,
        # Else it knows the second prompt.
        enable_prefix_caching=False,
        **options,
    )

    def run(prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
        sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
        given = [{"prompt_token_ids": one} for one in prompts]
        begin = time.perf_counter()
        outputs = llm.generate(given, sampling, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in outputs], time.perf_counter() - begin

    written, _ = run(job["prompts"], job["written"])
    random.seed(0)
    read, wrote = [], []
    for repeat in range(repeats + 1):
        ids = [random.randrange(job["vocabulary"]) for _ in range(prompt)]
        # The first token comes with the prompt.
        (_, one), (_, more) = run([ids], 1), run([ids], 1 + new)
        if repeat:
            read.append(one)
            wrote.append(more - one)
    return {"written": written, "prefill": statistics.median(read), "decode": statistics.median(wrote)}


def main() -> None:
    given, results = map(Path, sys.argv[1:])
    import torch
    import transformers
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    job = json.loads(given.read_text())
    found: dict[str, Any] = {module.__name__: module.__version__ for module in (vllm, torch, transformers)}
    found = {"versions": found, "rounds": []}
    for _ in range(job["rounds"]):
        found["rounds"].append({})
        for name, directory in job["directories"].items():
            try:
                found["rounds"][-1][name] = measured(job, directory, job["options"])
            except Exception as error:  # what is told
                found["rounds"][-1][name] = {"error": f"{type(error).__name__}: {error}"}
            gc.collect()
            cleanup_dist_env_and_memory()
            results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
