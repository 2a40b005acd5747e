"""How a run starts the evaluation of a step: as a process beside it, or, where it is a Slurm job, as another one."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.sbatch import EvaluationJob, render_evaluation
from launch.cluster.slurm import submitted_job
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.services import Lighteval


@dataclass(frozen=True)
class LocalEvaluator:
    """A process with one thread, no GPU and the lowest priority, which ends with the calling one at the latest."""

    run: Path
    logs: Path

    def command(self, step: int) -> list[str]:
        """See `launch.train.evaluations.Evaluator`; GPUs are the training's."""
        module = [sys.executable, "-P", "-m", "launch.evaluate.job", str(self.run), str(step)]
        return ["env", "CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1", *module, "--launcher", str(os.getpid())]

    def log(self, step: int) -> Path:
        """See `launch.train.evaluations.Evaluator`."""
        return self.logs / f"{step}.log"

    def told(self, last_line: str) -> str:
        """See `launch.train.evaluations.Evaluator`."""
        return last_line


@dataclass(frozen=True)
class SlurmEvaluator:
    """A job of its own. Its script lies beside its log.

    Attributes:
        run: the run's folder.
        recipe: as it was submitted: its `slurm` section was filled from the profile then.
    """

    run: Path
    logs: Path
    recipe: Recipe

    def command(self, step: int) -> list[str]:
        """See `launch.train.evaluations.Evaluator`."""
        script = self.logs / f"{step}.sh"
        job = EvaluationJob(
            run=self.run.name,
            step=step,
            folder=self.run,
            logs=self.logs,
            code=Path(__file__).resolve().parents[2],
            python=sys.executable,
            resources=self.recipe.slurm,
            evaluation=self.recipe.lighteval or Lighteval(),
        )
        write_atomic(script, render_evaluation(job))
        return ["sbatch", "--parsable", str(script)]

    def log(self, step: int) -> Path:
        """See `launch.train.evaluations.Evaluator`."""
        return self.logs / f"{step}.log"

    def told(self, last_line: str) -> str:
        """See `launch.train.evaluations.Evaluator`."""
        job = submitted_job(last_line)
        return f"submitted: {last_line}" if job is None else f"submitted as job {job}"
