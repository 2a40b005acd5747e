"""What every stage teaches the tiny model, over several pretraining seeds, on problems held out from all of them.

    python posttraining/benchmarks/learning.py runs/a/export runs/b/export runs/c/export --work learning [--write]

Each base goes through the chain of recipes/tiny with its own seed, with DPO beside APO-zero on the same pairs and GRPO
without the length penalty beside GRPO with it. About twenty minutes on two cores; a second start goes on in `--work`.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from learning_tables import Chain, tables
from measured import publish

from posttraining.evaluate.results import read_results

PROBLEMS, PROBLEM_SEED = 600, 20261128
"""Other problems than those of recipes/tiny/evaluate.yaml, by which settings were chosen."""
ACCURACY_ALONE = [{"path": "posttraining.rewards.accuracy"}]
MODELS = ("base", "sft", "apo", "dpo", "grpo", "grpo-no-penalty", "merge")


def main() -> None:
    """Run what is not done yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", type=Path, help="exported models, pretrained with seeds 1, 2, …")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is computed")
    parser.add_argument("--at-once", type=int, default=2, help="chains that run at a time, each with one thread")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<today>-learning.md")
    parser.add_argument("--set", action="append", default=[], help="a key of every chain's config, as for pipeline")
    given = parser.parse_args()
    folders = [given.work / f"seed-{seed}" for seed in range(1, len(given.bases) + 1)]
    for seed, (base, folder) in enumerate(zip(given.bases, folders, strict=True), 1):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.json").write_text(json.dumps(chain(base, folder / "chain", seed), indent=2) + "\n")
    with ThreadPoolExecutor(given.at_once) as lanes:
        codes = list(lanes.map(lambda folder: run(folder, given.set), folders))
    if any(codes):
        sys.exit(f"failed; see {', '.join(str(f / 'log') for f, code in zip(folders, codes, strict=True) if code)}")
    chains = [read(seed, folder / "chain") for seed, folder in enumerate(folders, 1)]
    publish("learning", "What each stage teaches", tables(chains, PROBLEMS, PROBLEM_SEED), write=given.write)


def chain(base: Path, output: Path, seed: int) -> dict[str, Any]:
    """The pipeline of one base."""
    pairs = {"path": "{pairs}/pairs.jsonl", "held_out_path": "{pairs}/held_out.jsonl"}
    stages = [
        stage("sft", "sft", model="{model}"),
        stage("pairs", "pairs", model="{sft}", weak_model="{sft}/early"),
        stage("apo", "prefer", model="{sft}", data=pairs),
        stage("dpo", "prefer", model="{sft}", data=pairs, loss_type=["sigmoid"]),
        stage("grpo", "grpo", model="{apo}"),
        stage("grpo-no-penalty", "grpo", model="{apo}", rewards=ACCURACY_ALONE),
        stage("merge", "merge", models=[{"model": "{grpo}", "weight": 0.9}, {"model": "{sft}", "weight": 0.1}]),
        stage(
            "scores", "evaluate", models={name: "{" + ("model" if name == "base" else name) + "}" for name in MODELS}
        ),
    ]
    stages[-1]["set"]["tasks"] = [
        task("greedy", 0.0),
        task("sampled", 1.0),
        task("plain-greedy", 0.0, mode="plain", models=["base"]),
        task("plain-sampled", 1.0, mode="plain", models=["base"]),
    ]
    return {"model": str(base), "output_dir": str(output), "seed": seed, "final": "merge", "stages": stages}


def stage(name: str, command: str, **keys: Any) -> dict[str, Any]:
    """A stage of the shipped tiny recipe with some keys changed."""
    return {"name": name, "command": command, "recipe": "tiny", "set": keys}


def task(name: str, temperature: float, **keys: Any) -> dict[str, Any]:
    """The held-out problems, asked in one way."""
    data = {"generated": "arithmetic", "examples": PROBLEMS, "seed": PROBLEM_SEED}
    return {"name": name, "data": data, "temperature": temperature, "max_new_tokens": 130, **keys}


def run(folder: Path, overrides: list[str]) -> int:
    """Run one chain, or what is left of it; its exit code."""
    command = [sys.executable, "-m", "posttraining", "pipeline", str(folder / "pipeline.json")]
    command += [word for override in overrides for word in ("--set", override)]
    with (folder / "log").open("a", encoding="utf-8") as log:
        code = subprocess.run(command, check=False, stdout=log, stderr=log).returncode
    print(f"{folder.name}: {'done' if code == 0 else f'exit code {code}'}", flush=True)
    return code


def read(seed: int, output: Path) -> Chain:
    """What one chain left."""
    margins = {
        name: json.loads((output / name / "margins.json").read_text(encoding="utf-8")) for name in ("apo", "dpo")
    }
    return Chain(seed, read_results(output / "scores"), margins)


if __name__ == "__main__":
    main()
