"""Run by test_vllm.py in vLLM's own environment, with the plug-in or without: what vLLM makes of checkpoints.

``vllm_apart.py JOBS RESULTS``: two JSON files. Not a test module, and it may import nothing of this project.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def asked(job: dict[str, Any]) -> dict[str, Any]:
    """What vLLM writes after every prompt, and per forced sequence the log-probability and the best token of every
    position but the first; with an adapter, of what it wrote."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 16, **job["options"]}
    llm = LLM(model=job["directory"], **options)
    adapter = {"lora_request": LoRARequest("adapter", 1, job["adapter"])} if "adapter" in job else {}

    def run(sequences: list[list[int]], **settings: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": sequence} for sequence in sequences]
        sampling = SamplingParams(temperature=0, ignore_eos=True, **settings)
        return llm.generate(prompts, sampling, use_tqdm=False, **adapter)

    written = run(job["prompts"], max_tokens=job["new_tokens"], logprobs=1)
    tokens = [list(one.outputs[0].token_ids) for one in written]
    if "adapter" in job:
        # On a CPU, vLLM 0.32.0 stops when it is asked for the log-probabilities of a prompt with an adapter.
        places = [zip(ids, one.outputs[0].logprobs, strict=True) for ids, one in zip(tokens, written, strict=True)]
        logprobs = [[place[token].logprob for token, place in one] for one in places]
        return {"written": tokens, "logprobs": logprobs, "best": tokens}
    forced = run(job["forced"], max_tokens=1, prompt_logprobs=1)
    logprobs, best = [], []
    for sequence, output in zip(job["forced"], forced, strict=True):
        places = list(zip(sequence, output.prompt_logprobs, strict=True))[1:]
        logprobs.append([place[token].logprob for token, place in places])
        best.append([next(token for token, entry in place.items() if entry.rank == 1) for _, place in places])
    return {"written": tokens, "logprobs": logprobs, "best": best}


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    begin = time.monotonic()
    import torch
    import transformers
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    outcomes: dict[str, Any] = {
        "versions": {module.__name__: module.__version__ for module in (vllm, torch, transformers)},
        "package is installed": importlib.util.find_spec("linearpatch_kernels") is not None,
        "seconds": {"import": round(time.monotonic() - begin)},
    }
    for name, job in json.loads(jobs.read_text()).items():
        begin = time.monotonic()
        try:
            outcomes[name] = asked(job)
        except Exception as error:  # what is looked for, in some of the jobs
            outcomes[name] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        # The next model starts anew: one that has experts needs groups of processes that another does not make.
        cleanup_dist_env_and_memory()
        outcomes["seconds"][name] = round(time.monotonic() - begin)
        outcomes["peak memory, GB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)
        # Every time, so that a run that was stopped tells how far it came.
        results.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
