"""Run in a process of its own by test_checkpoint.py: loads patched checkpoints where the package cannot be imported.

Prints one JSON line per checkpoint. Not a test module, and it may import nothing of this project.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "linearpatch_kernels":
            raise ModuleNotFoundError(f"No module named {name!r}")


def refusal(loader: Any, directory: Path, **options: Any) -> str:
    try:
        loader.from_pretrained(directory, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def main() -> None:
    sys.meta_path.insert(0, NotInstalled())
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for directory in map(Path, sys.argv[1:]):
        expected = load_file(directory / "expected.safetensors")
        name = json.loads((directory / "config.json").read_text())["architectures"][0]
        stock_causal_lm = getattr(transformers, name.removeprefix("LinearPatch"))
        stock_decoder = getattr(transformers, type(stock_causal_lm.config_class()).__name__.replace("Config", "Model"))
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        decoder = AutoModel.from_pretrained(directory, trust_remote_code=True)
        with torch.no_grad():  # the package may have used its compiled kernel, whose additions come in another order
            logits, states = model(expected["ids"]).logits, decoder(expected["ids"]).last_hidden_state
            same = torch.allclose(logits, expected["logits"], rtol=0, atol=1e-5)
            same_decoder = torch.allclose(model.lm_head(states), expected["logits"], rtol=0, atol=1e-5)
        again = directory.with_name(directory.name + "-again")
        model.save_pretrained(again)
        narrow = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype=torch.bfloat16)
        print(
            json.dumps(
                {
                    "name": type(model).__name__,
                    "same": same,
                    "same_decoder": same_decoder,
                    "files_again": sorted(path.name for path in again.glob("*") if path.suffix != ".safetensors"),
                    "config_again": (again / "config.json").read_text() == (directory / "config.json").read_text(),
                    "narrow": sorted({str(parameter.dtype) for parameter in narrow.parameters()}),
                    "auto": [refusal(auto, directory) for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)],
                    "stock": [
                        refusal(stock, directory, **options)
                        for stock in (stock_causal_lm, stock_decoder)
                        for options in ({}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True})
                    ],
                }
            )
        )


if __name__ == "__main__":
    main()
