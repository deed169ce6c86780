"""docs/add/family.md: a family that is one file. In processes of its own: the Auto classes forget nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linearpatch_kernels import modeling
from linearpatch_kernels.errors import InputError
from tests.support.field import text_file
from tests.support.pages import ROOT, python_of, run_program
from tests.support.tiny import tiny_tokenizer

REST = """
import json, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from linearpatch_kernels import modeling
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.merging.merge import check_mergeable
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.units import sublayers
from linearpatch_kernels.modeling.views import partial_decoder
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.nn import HadamardPatch
from linearpatch_kernels.span import Span

folder = Path(sys.argv[1])
sys.path.insert(0, "TOOLS")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(
    modeling_smollm3.SmolLM3Config(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )
).eval()
model.save_pretrained(folder / "dense")
ids = torch.randint(3, 97, (2, 12))
told = {"kinds": model.config.no_rope_layers, "families": list(modeling.FAMILIES)}
with torch.no_grad():
    stream = partial_decoder(model, 0, 3, embed=True)(ids, use_cache=False).last_hidden_state
    end = partial_decoder(model, 3, 6, norm=True)(inputs_embeds=stream, use_cache=False).last_hidden_state
    told["parts"] = torch.equal(end, model.model(ids, use_cache=False).last_hidden_state)
    told["units"] = [half.units for half in sublayers(model)]
    cut = keep_layers(model, [0, 1, 3, 5])
    told["cut"] = [cut.config.no_rope_layers, cut.config.layer_types, cut.config.num_hidden_layers]
    patched = patched_model(cut, {2: HadamardPatch(48, rank=4)})
    patched.save_pretrained(folder / "patched")
    again = AutoModelForCausalLM.from_pretrained(folder / "patched")
    told["again"] = type(again).__name__
    told["logits"] = torch.equal(again(ids).logits, patched(ids).logits)
    torch.save((ids, patched(ids).logits), folder / "logits.pt")
try:
    check_mergeable(model, Span(2, 4))
except InputError as error:
    told["merge"] = str(error)
check_mergeable(model, Span(1, 3))
import choices_reference

told["page"] = "| `smollm3` | SmolLM3 |" in choices_reference.page()
print(json.dumps(told))
"""

ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/patched", trust_remote_code=True)
ids, logits = torch.load(sys.argv[1] + "/logits.pt")
with torch.no_grad():
    error = float((model(ids).logits - logits).abs().max())
print(type(model).__module__.startswith("transformers_modules"), error < 1e-4)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the page's file, and what `REST` made and told behind its record."""
    folder = tmp_path_factory.mktemp("family")
    page = python_of("add/family.md")
    (folder / "my_family.py").write_text(page)
    (folder / "using.py").write_text(page.partition("if __name__")[0] + REST.replace("TOOLS", str(ROOT / "tools")))
    (folder / "told.json").write_text(run_program(folder / "using.py", folder))
    tiny_tokenizer().save_pretrained(folder / "dense")
    return folder


def test_a_model_of_it_is_cut_patched_saved_and_loaded(folder: Path) -> None:
    told = json.loads((folder / "told.json").read_text())
    assert told["families"][-1] == "linearpatch_smollm3"
    assert told["kinds"] == [1, 1, 1, 0, 1, 1]
    assert told["parts"]
    assert told["units"] == [2, 80]
    assert told["cut"] == [[1, 1, 0, 1], ["full_attention"] * 4, 4]
    assert told["again"] == "LinearPatchSmolLM3ForCausalLM"
    assert told["logits"]
    assert told["merge"].startswith("the layers 2:4 are of different kinds")
    assert told["page"]


def test_its_patched_checkpoint_loads_where_it_was_not_added(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    printed = run_program(tmp_path / "alone.py", folder, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert printed.split() == ["True", "True"]


def test_the_command_lists_prunes_and_merges_it(folder: Path, tmp_path: Path) -> None:
    file, dense = folder / "my_family.py", folder / "dense"
    assert json.loads(run_program(file, "doctor", "--json", "-"))["families"]["smollm3"] == "SmolLM3"
    assert "phi3 (Phi-3), smollm3 (SmolLM3)." in " ".join(run_program(file, "doctor", "--help").split())
    small = ("--text", text_file(tmp_path), "--samples", 4, "--length", 16, "--device", "cpu")
    run_program(file, "prune", dense, "--drop", 1, "--fit", "linearpatch", "-o", tmp_path / "pruned", *small)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["model_type"], len(config["no_rope_layers"])) == ("linearpatch_smollm3", 5)
    run_program(file, "merge", dense, "--layers", 5, "--variant", "come", "-o", tmp_path / "merged", *small)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["model_type"], len(config["no_rope_layers"])) == ("smollm3", 5)


def test_a_family_that_is_there_is_refused() -> None:
    with pytest.raises(InputError, match="a family is called 'llama' already"):
        modeling.add_family(modeling.family_of("llama"))
