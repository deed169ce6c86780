"""Run in a process of its own by test_older_transformers.py, with an older Transformers in front of the path.

Prints one JSON line: the version, what came of each checkpoint (``same``, ``other`` or the error), and what its
tokenizer makes of a text. Not a test module; it may import nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def outcome(directory: Path) -> str:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = load_file(directory / "expected.safetensors")
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(expected["ids"]).logits
        model.save_pretrained(directory.with_name(directory.name + "-again"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "same" if torch.allclose(logits, expected["logits"], rtol=0, atol=1e-4) else "other"


def main() -> None:
    import transformers
    from transformers import AutoTokenizer

    places = [Path(argument) for argument in sys.argv[1:]]
    outcomes = {place.name: outcome(place) for place in places}
    tokens = {place.name: AutoTokenizer.from_pretrained(place)("5 <new> 6")["input_ids"] for place in places}
    print(json.dumps({"version": transformers.__version__, "outcomes": outcomes, "tokens": tokens}))


if __name__ == "__main__":
    main()
