"""Runs on a Slurm cluster."""

import shutil

from nanotron_recipes.errors import UserError


def require_sbatch() -> None:
    """Raise UserError where jobs cannot be submitted from this machine."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is missing, so this machine cannot submit a Slurm job: call this on the cluster's login node, "
            "or leave out --nodes (NODES=) to train on this machine"
        )
