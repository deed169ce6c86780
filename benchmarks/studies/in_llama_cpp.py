"""Run by engines.py where llama-cpp-python is: what llama.cpp writes for GGUF files, and how fast.

``in_llama_cpp.py JOB RESULTS``: two JSON files. It may import nothing of this project.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp


def measured(job: dict[str, Any], file: str) -> dict[str, Any]:
    """The tokens after every prompt, and seconds: of reading a prompt, and of writing after one."""
    context = max(job["prompt_tokens"] + job["new_tokens"], len(job["prompts"][0]) + job["written"]) + 1
    llm = llama_cpp.Llama(model_path=file, n_ctx=context, n_threads=1, n_threads_batch=1, verbose=False)

    def writing(prompt: list[int]) -> Any:
        llm.reset()
        return llm.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)

    written = []
    for prompt in job["prompts"]:
        tokens = writing(prompt)
        written.append([int(next(tokens)) for _ in range(job["written"])])
    random.seed(0)
    read, wrote = [], []
    for repeat in range(job["repeats"] + 1):
        tokens = writing([random.randrange(job["vocabulary"]) for _ in range(job["prompt_tokens"])])
        begin = time.perf_counter()
        next(tokens)  # comes with the prompt
        between = time.perf_counter()
        for _ in range(job["new_tokens"]):
            next(tokens)
        if repeat:
            read.append(between - begin)
            wrote.append(time.perf_counter() - between)
    llm.close()
    return {"written": written, "prefill": statistics.median(read), "decode": statistics.median(wrote)}


def main() -> None:
    given, results = map(Path, sys.argv[1:])
    job = json.loads(given.read_text())
    rounds = [{name: measured(job, file) for name, file in job["files"].items()} for _ in range(job["rounds"])]
    results.write_text(json.dumps({"versions": {"llama-cpp-python": llama_cpp.__version__}, "rounds": rounds}))


if __name__ == "__main__":
    main()
