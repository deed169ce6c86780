"""Run by test_llama_cpp.py in an environment that has llama-cpp-python: what llama.cpp makes of GGUF files.

``llama_cpp_apart.py JOBS RESULTS``: two JSON files. Not a test module, and it may import nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def asked(job: dict[str, Any]) -> dict[str, Any]:
    """The tokens of every text, and per forced sequence the log-probability and the best token of every position but
    the first; what is written after every prompt."""
    llm = llama_cpp.Llama(
        model_path=job["file"],
        n_ctx=job["context"],
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        # Keys and values in float32: in float16, which is its default, they are rounded.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    found: dict[str, Any] = {"logprobs": [], "best": [], "written": []}
    found["tokens"] = [llm.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    for sequence in job["forced"]:
        llm.reset()
        llm.eval(sequence)
        scores = np.array(llm.scores[: len(sequence) - 1], dtype=np.float64)
        largest = scores.max(axis=1, keepdims=True)
        log = scores - largest - np.log(np.exp(scores - largest).sum(axis=1, keepdims=True))
        found["logprobs"].append([float(row[token]) for row, token in zip(log, sequence[1:], strict=True)])
        found["best"].append(scores.argmax(axis=1).tolist())
    for prompt in job["prompts"]:
        llm.reset()
        tokens = llm.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        found["written"].append([int(next(tokens)) for _ in range(job["new_tokens"])])
    llm.close()
    return found


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    outcomes: dict[str, Any] = {"version": llama_cpp.__version__}
    for name, job in json.loads(jobs.read_text()).items():
        try:
            outcomes[name] = asked(job)
        except ValueError as error:  # what it says of a file that it does not load
            outcomes[name] = {"error": str(error)}
    results.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
