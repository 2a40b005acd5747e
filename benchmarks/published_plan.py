"""How long a start takes late in the published plan: 11.1T tokens of 71 sources, on sparse files of that size.

    python benchmarks/published_plan.py          [--step 4700000 --folder DIR --dry]

The files hold holes but for the entries of the indices that are looked at; the largest has 8 TB. A new process imports
what it needs, then reads the recipe, opens all sources, and makes one rank's batch of the step. Nothing is left behind.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import ROOT, Section, publish
from benchmarks.sparse_sources import make_sources
from nanotron_recipes.loading import load_recipe

RECIPE = "smollm3-3b"
STEP = 4_700_000
DP = 192

MEASURE = """
import json, re, sys, time
from pathlib import Path

from data.plan import DataPlan
from nanotron_recipes.loading import load_recipe


def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


recipe_name, data, step, dp = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
before, start = anonymous_bytes(), time.perf_counter()
overrides = [f"variables.SMOLLM3_DATA={data}", "tokenizer.tokenizer_name_or_path=null"]
recipe = load_recipe(recipe_name, overrides).recipe
read = time.perf_counter()
plan = DataPlan.from_recipe(recipe)
opened = time.perf_counter()
size = plan.global_batch_size // dp
batch = plan.step(step, dp=dp, dp_rank=dp - 1, num_micro_batches=1, micro_batch_size=size)
end = time.perf_counter()
print(json.dumps({
    "recipe_seconds": read - start, "open_seconds": opened - read, "batch_seconds": end - opened,
    "seconds": end - start, "anonymous_bytes": anonymous_bytes() - before,
    "stage": batch.stage, "shape": batch.micro_batches[0].tokens.shape,
    "valid_targets": batch.num_valid_targets, "own_valid_targets": int(batch.micro_batches[0].target_mask.sum()),
}))
"""
"""What the new process runs."""


def measure_start(folder: Path, step: int, dp: int = DP) -> dict[str, object]:
    """Seconds and memory from the end of the imports to the batch of `step`, in a new process; the sources of the
    shipped recipe lie in `folder`."""
    command = [sys.executable, "-P", "-c", MEASURE, RECIPE, str(folder), str(step), str(dp)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, object] = json.loads(done.stdout)
    return result


def main() -> None:
    """Make the files, measure five starts, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--step", type=int, default=STEP)
    parser.add_argument("--folder", type=Path, help="where the sparse files are made; default: the temporary folder")
    parser.add_argument("--dry", action="store_true", help="write no result")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="published-plan-", dir=arguments.folder))
    try:
        recipe = load_recipe(RECIPE, [f"variables.SMOLLM3_DATA={folder}"]).recipe
        apparent, _ = make_sources(recipe, arguments.step)
        used = sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())
        runs = [measure_start(folder, arguments.step) for _ in range(5)]
    finally:
        shutil.rmtree(folder)
    rows = [
        (
            str(number + 1),
            *(f"{run[key]:.2f}" for key in ("recipe_seconds", "open_seconds", "batch_seconds", "seconds")),
            f"{int(str(run['anonymous_bytes'])) / 1e6:.0f}",
        )
        for number, run in enumerate(runs)
    ]
    columns = ("start", "recipe, s", "sources and stages, s", "batch, s", "all, s", "anonymous memory, MB")
    notes = (
        f"{apparent / 1e12:.1f} TB of tokens and indices as the files' sizes have it, {used / 1e6:.0f} MB on the disk. "
        f"The batch is rank {DP - 1}'s of {DP} at step {arguments.step:,}, {runs[0]['shape']} tokens, stage "
        f"{runs[0]['stage']!r}. Memory is what the process has above what it had after its imports."
    )
    section = Section(f"From the imports to the batch of step {arguments.step:,}", columns, rows, notes)
    publish("published-plan", "A start late in the published plan", [section], write=not arguments.dry)


if __name__ == "__main__":
    main()
