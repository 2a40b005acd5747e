"""Standard benchmarks by lighteval, which has an environment of its own (see posttraining/docs/benchmarks.md)."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from posttraining.errors import StageFailed, mistake
from posttraining.files import write_whole

LINK, MODEL_FILE, CACHE = "model", "model.yaml", "cache"


@dataclass(kw_only=True)
class HarnessSettings:
    """What lighteval is asked."""

    tasks: str
    """As lighteval writes them, `aime25|0,gsm8k|5`; docs/benchmarks.md says what each reads from the Hub."""
    lighteval: str = ".venv-eval/bin/lighteval"
    """The program, in its own environment."""
    backend: Literal["accelerate", "vllm"] = "accelerate"
    """lighteval's backend; vllm for long answers."""
    max_samples: int | None = None
    """Problems of each task; null: all."""
    custom_tasks: str | None = None
    """A Python file with further tasks, as lighteval takes them."""
    batch_size: int = 8
    """Of the accelerate backend."""
    device: str = "cuda"
    """Of the accelerate backend: cuda or cpu."""
    seed: int = 42
    """Of sampling with vLLM."""
    max_new_tokens: int = 32768
    """The longest answer, thoughts included."""
    temperature: float = 0.6
    """SmolLM3 is meant to be sampled with 0.6 and top_p 0.95."""
    top_p: float = 0.95
    """Of the tokens by probability, those that make up this share."""
    system_prompt: str | None = None
    """`/no_think` asks a SmolLM3-like model for answers without thoughts."""


def check_harness(settings: HarnessSettings, file: str) -> None:
    """Raise Mistake where the program is missing."""
    if shutil.which(settings.lighteval) is None:
        expected = "no such program; docs/benchmarks.md says how it is installed"
        raise mistake(file, "harness.lighteval", settings.lighteval, expected)


def model_config(settings: HarnessSettings) -> dict[str, Any]:
    """What lighteval's model file says; it is read in the folder of the results, where `model` leads to the model."""
    generation: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    generation |= {"temperature": settings.temperature, "top_p": settings.top_p}
    # lighteval caches answers in cache_dir/model_name, so an absolute name would have it write into the model's folder.
    parameters: dict[str, Any] = {"model_name": LINK, "cache_dir": CACHE, "generation_parameters": generation}
    if settings.backend == "accelerate":
        parameters |= {"batch_size": settings.batch_size, "device": settings.device}
    else:
        generation["seed"] = settings.seed
    if settings.system_prompt is not None:
        parameters["system_prompt"] = settings.system_prompt
    return {"model_parameters": parameters}


def command(settings: HarnessSettings) -> list[str]:
    """The command line. lighteval strips what stands between <think> and </think> before it scores."""
    program = shutil.which(settings.lighteval)
    assert program is not None  # check_harness
    words = [str(Path(program).absolute()), settings.backend, MODEL_FILE, settings.tasks, "--output-dir", "."]
    words += ["--remove-reasoning-tags", "--reasoning-tags", "[('<think>', '</think>')]"]
    if settings.custom_tasks is not None:
        words += ["--custom-tasks", str(Path(settings.custom_tasks).absolute())]
    if settings.max_samples is not None:
        words += ["--max-samples", str(settings.max_samples)]
    return words


def run_harness(settings: HarnessSettings, model: Path, output: Path) -> dict[str, dict[str, float]]:
    """Run the tasks on a model; returns {task: {metric: value}}. It is not asked again where `output` has results.

    Raises StageFailed.
    """
    if not (found := sorted(output.rglob("results_*.json"))):
        write_whole(output / MODEL_FILE, yaml.safe_dump(model_config(settings)))
        link = output / LINK
        link.unlink(missing_ok=True)
        link.symlink_to(model.resolve())
        code = subprocess.run(command(settings), check=False, cwd=output).returncode
        link.unlink()
        shutil.rmtree(output / CACHE, ignore_errors=True)
        if code:
            raise StageFailed(f"lighteval ended with exit code {code}")
        found = sorted(output.rglob("results_*.json"))
    if not found:
        raise StageFailed(f"lighteval left no results in {output}")
    return _figures(found[-1])


def _figures(file: Path) -> dict[str, dict[str, float]]:
    try:
        results: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
        return {
            task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
            for task, metrics in results.items()
        }
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise StageFailed(f"{file}: not what lighteval's results look like ({type(error).__name__})") from error
