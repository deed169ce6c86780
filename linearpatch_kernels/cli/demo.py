"""``linearpatch demo``: the main job on a model from PyPI, from start to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from linearpatch_kernels.cli.console import (
    Notes,
    Reporter,
    candidates_table,
    check_json,
    console,
    print_quality,
    print_seconds,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.inputs import (
    find_model,
    heldout_windows,
    make_windows,
    num_layers_of,
    read_texts,
    title_of,
)
from linearpatch_kernels.cli.options import JsonFile, Length, Samples, given_path
from linearpatch_kernels.cli.prune import COMPARED, report_data, summarise, usage
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import RECORDS


def demo(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where the two models and the report go.", parser=given_path
        ),
    ] = Path("demo-output"),
    drop: Annotated[int, typer.Option("--drop", metavar="N", min=1, help="How many of the 30 layers to remove.")] = 6,
    samples: Samples = 64,
    length: Length = 512,
    json_file: JsonFile = None,
) -> None:
    """The main job on SmolLM2-135M: drop 6 of 30 layers, heal, measure on held-out text, save, reload, write on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from linearpatch_kernels.evaluation.latency import Speed, compare_speed, model_size
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.evaluation.report import QualityRow
    from linearpatch_kernels.fingerprints import fingerprint_model
    from linearpatch_kernels.forward import Run
    from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint, save_files
    from linearpatch_kernels.processes import check_alone
    from linearpatch_kernels.pruning.apply import apply_plan
    from linearpatch_kernels.pruning.plan import PrunePlan
    from linearpatch_kernels.pruning.reporting import joint_magnitudes, prune_report
    from linearpatch_kernels.pruning.scores import check_drop
    from linearpatch_kernels.pruning.search import plan_pruning
    from linearpatch_kernels.pruning.selection import compare_candidates, usable_candidates

    check_alone("demo")
    places = {
        "healed (auto)": output / "auto",
        "healed (structured)": output / "structured",
        "report": output / "report",
    }
    check_json(json_file, output=output)
    for place in places.values():
        check_output(place, overwrite=True)
    run, notes = Reporter(), Notes()
    texts = read_texts(None, None)
    with run.stage("load the model"):
        source = find_model("demo", "float32", None, False)
    check_drop(drop, source.num_layers)
    with run.stage("tokenise"):
        windows = make_windows(
            source,
            source.tokenizer,
            texts,
            samples=samples,
            heldout=heldout_windows(samples),
            length=length,
        )
    with run.stage("load the model"):
        dense = source.load()
    check_output(places["healed (auto)"], 2 * parameter_bytes(dense), overwrite=True)
    with run.stage("calibrate and fit"):
        pruning = plan_pruning(
            dense,
            windows.fit,
            windows.heldout,
            drop=drop,
            about=windows.about,
            fingerprint=fingerprint_model(dense),
            noted=notes,
            progress=run,
        )
    assert pruning.choice is not None
    assert windows.evaluation is not None
    structured = pruning.choice.structured()
    plans = {
        "healed (auto)": pruning.plan,
        "healed (structured)": dataclasses.replace(pruning.plan, joints=structured.joints, candidates=structured.table),
    }
    spans = pruning.plan.spans
    candidates = usable_candidates(pruning.statistics, spans, COMPARED, noted=notes)
    candidates |= {name: plan.joints for name, plan in plans.items()}
    with run.stage("evaluate"):
        found = compare_candidates(
            dense, windows.evaluation, candidates, description="evaluating", noted=notes, run=Run(progress=run)
        )
    models = {"dense": dense} | {
        name: apply_plan(dense, PrunePlan(pruning.plan.num_layers, joints)) for name, joints in candidates.items()
    }
    speeds: dict[str, Speed] = {}
    with run.stage("measure speed"), left_out("the speed", notes):
        speeds = compare_speed(models, progress=run)
    with run.stage("save"):
        for name, plan in plans.items():
            files = {f"{RECORDS}/{file}": content for file, content in plan.files().items()}
            save_checkpoint(models[name], source.tokenizer, places[name], overwrite=True, extra_files=files)
    with run.stage("reload and write on"):
        reloaded = AutoModelForCausalLM.from_pretrained(places["healed (auto)"]).eval()
        again = AutoTokenizer.from_pretrained(places["healed (auto)"])
        prompt = "The Hadamard transform is"
        ids = again(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            same = torch.equal(reloaded(ids).logits, models["healed (auto)"](ids).logits)
            written = reloaded.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=again.eos_token_id)
        continuation = again.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    with left_out("the report", notes):
        data = dataclasses.replace(
            report_data("demo", pruning, found, windows, run, dense),
            notes=notes.all,
            quality=[
                QualityRow(name, num_layers_of(models[name]), q, model_size(models[name]), speeds.get(name))
                for name, q in found.items()
            ],
            sample_prompt=prompt,
            sample=continuation,
            usage=usage(str(places["healed (auto)"]), patched=True),
            files={str(place): name for name, place in places.items()},
        )
        magnitudes = joint_magnitudes(dense, windows.evaluation[:4], pruning.plan.joints[0])
        report = prune_report(data, pruning.plan, pruning.statistics, magnitudes, title_of("demo"), noted=notes)
        save_files(places["report"], report, overwrite=True)
    summary = summarise(pruning.plan, found, run) | {"speed": {name: one.to_dict() for name, one in speeds.items()}}
    write_json(json_file, summary)
    for table in candidates_table(pruning.plan):
        print_table(*table)
    print_quality(found, texts.report_source)
    rows = [
        [name, str(num_layers_of(one)), f"{model_size(one).parameters / 1e6:.1f} M"]
        + [f"{getattr(speeds[name], key):,.0f}" for key in ("prefill_tokens_per_second", "decode_tokens_per_second")]
        for name, one in models.items()
        if name in speeds
    ]
    print_table("Speed", ["model", "layers", "parameters", "prefill tok/s", "decode tok/s"], rows)
    console.print(f"Removed the layers {', '.join(map(str, spans))} of {num_layers_of(dense)}.")
    console.print(
        f"Reloaded {places['healed (auto)']}: its logits are {'' if same else 'NOT '}those of the model in memory.",
        soft_wrap=True,
    )
    console.print(f"It continues “{prompt}” with:\n  {continuation.strip()}\n")
    for name, place in places.items():
        console.print(f"{name}: {place}", soft_wrap=True)
    print_seconds(run)
    if not same:
        raise InputError(
            "the reloaded model differs from the one in memory: please report this with `linearpatch doctor`"
        )
