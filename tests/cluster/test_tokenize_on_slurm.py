"""`nanotron-recipes tokenize --launcher slurm`: nodes share the work, and make what one machine makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster
from small_pretraining import small_recipe, write_recipe, write_text

from data.manifest import read_manifest
from data.tokenization import tokenize
from nanotron_recipes.loading import load_recipe

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]


def test_two_nodes_make_the_shards_of_one_machine(cluster: SlurmCluster, tmp_path: Path) -> None:
    folder = cluster.work / "tokenizing"
    write_text(folder)
    here, there = small_recipe(folder), small_recipe(folder)
    here["corpus"]["path"], there["corpus"]["path"] = str(tmp_path / "corpus"), "corpus"
    expected = tokenize(load_recipe(str(write_recipe(tmp_path / "here.yaml", here))).recipe, "here")
    write_recipe(folder / "there.yaml", there)

    said = submit(cluster, folder, "tokenize", "there.yaml", "--launcher", "slurm", "--nodes", "2")
    job = int(said.split("submitted: job ")[1].split(",")[0])
    cluster.wait(job, "COMPLETED", 120)

    for manifest in expected:
        made = read_manifest(folder / "corpus" / manifest.source)
        assert (made.train, made.validation) == (manifest.train, manifest.validation)
    log = (folder / f"corpus/jobs/1/slurm-{job}.log").read_text()
    assert "words, numbers" in log and "error" not in log


def submit(cluster: SlurmCluster, folder: Path, *words: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "PYTHON", "SLURM"))}
    environment = {**kept, "PYTHONPATH": str(REPOSITORY), "SLURM_CONF": cluster.environment["SLURM_CONF"]}
    command = [sys.executable, "-P", "-m", "launch.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
