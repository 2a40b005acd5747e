"""The real 3B: built, saved, exported by one process, loaded by transformers (long: 24 GB of memory, 15 GB of disk)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NUM_PARAMETERS = 3_075_098_624
WEIGHT_BYTES = 2 * NUM_PARAMETERS
MARGIN = 1.1
"""How much larger than transformers' own bfloat16 rounding ours may be."""

BUILD = """
from pathlib import Path
import torch
from model.build import build_model, initialize_weights
from nanotron_recipes.loading import dump_yaml, load_recipe
from parallel.checkpoint import save_checkpoint
from parallel.process_groups import single_process_context

recipe = load_recipe("smollm3-3b", ["parallelism.dp=1", "parallelism.tp=1"]).recipe
with single_process_context(torch.device("cpu")) as context:
    built = build_model(recipe, context, for_training=False)
    initialize_weights(built)
    save_checkpoint(Path(OUT), built.buckets, None, {"step": 0}, {"recipe.yaml": dump_yaml(recipe)})
    report(
        num_parameters=sum(parameter.numel() for parameter in built.module.parameters()),
        num_bytes=sum(p.numel() * p.element_size() for p in built.module.parameters()),
    )
"""

EXPORT = """
from pathlib import Path
from model.hf_export import export_checkpoint

done = export_checkpoint(Path(CHECKPOINT), Path(OUT))
report(hf_class=done.hf_class, weight_bytes=done.weight_bytes, files=done.weight_files)
"""

LOGITS_HF = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=getattr(torch, DTYPE))
ids = torch.arange(64).mul(1997).remainder(128256)[None]
with torch.no_grad():
    torch.save(model(ids).logits.float(), OUT)
shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
report(shapes=shapes)
"""

LOGITS_OURS = """
from pathlib import Path
import torch
from model.build import logits_from_tensors
from model.hf_export import checkpoint_recipe
from parallel.checkpoint import read_tensors

ids = torch.arange(64).mul(1997).remainder(128256)[None]
torch.save(logits_from_tensors(checkpoint_recipe(Path(CHECKPOINT)), read_tensors(Path(CHECKPOINT)), ids), OUT)
report()
"""

PRELUDE = """
import json, resource, sys
def report(**facts):
    facts["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(facts))
"""


def run_alone(script: str, **names: Path | str) -> dict[str, object]:
    """Run a script in a process of its own, so that its peak memory is its own, and return what it reports."""
    assignments = "".join(f"{name} = {str(value)!r}\n" for name, value in names.items())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + assignments + script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.long
def test_the_real_3b_is_built_saved_exported_and_loaded_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, SmolLM3Config

    checkpoint, export = tmp_path / "checkpoint", tmp_path / "export"
    built = run_alone(BUILD, OUT=checkpoint)
    assert built["num_parameters"] == NUM_PARAMETERS
    assert built["num_bytes"] == WEIGHT_BYTES

    exported = run_alone(EXPORT, CHECKPOINT=checkpoint, OUT=export)
    assert exported["hf_class"] == "SmolLM3ForCausalLM"
    assert exported["weight_bytes"] == WEIGHT_BYTES
    peak = exported["peak_bytes"]
    assert isinstance(peak, int) and peak <= 1.3 * WEIGHT_BYTES, f"{peak / WEIGHT_BYTES:.2f} of the weights"
    shards = sorted(export.glob("*.safetensors"))
    assert len(shards) == 2 and all(shard.stat().st_size <= 5 * 10**9 for shard in shards)
    assert (export / "model.safetensors.index.json").is_file()

    theirs = run_alone(LOGITS_HF, FOLDER=export, DTYPE="bfloat16", OUT=tmp_path / "theirs.pt")
    with torch.device("meta"):
        default = AutoModelForCausalLM.from_config(SmolLM3Config())
    assert theirs["shapes"] == {name: list(value.shape) for name, value in default.state_dict().items()}

    run_alone(LOGITS_OURS, CHECKPOINT=checkpoint, OUT=tmp_path / "ours.pt")
    run_alone(LOGITS_HF, FOLDER=export, DTYPE="float32", OUT=tmp_path / "exact.pt")
    ours, hf, exact = (torch.load(tmp_path / f"{name}.pt") for name in ("ours", "theirs", "exact"))
    rounding = relative_difference(hf, exact)
    figures = (
        f"export peak {peak / WEIGHT_BYTES:.2f} x weights; "
        f"bfloat16 against float32: ours {relative_difference(ours, exact):.4f}, "
        f"transformers' {rounding:.4f}; ours against transformers' {relative_difference(ours, hf):.4f}"
    )
    print(figures)
    assert relative_difference(ours, exact) <= MARGIN * rounding, figures
    # Two independent roundings of the same size differ by √2 of it.
    assert relative_difference(ours, hf) <= MARGIN * 2**0.5 * rounding, figures


def relative_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return float((logits - reference).square().mean().sqrt() / reference.square().mean().sqrt())
