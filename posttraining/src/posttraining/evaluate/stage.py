"""Evaluating models: offline tasks with standard errors, and the standard harness where it is asked.

    posttraining evaluate tiny --set models.mine=runs/merged --set output_dir=runs/scores

Tasks are asked of every model in one process. What is scored is kept beside `output_dir` until all is, so that an
evaluation that was killed goes on where it was.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttraining import lineage
from posttraining.datasets import DataSettings, as_conversations, check_prompts_alone, load_data
from posttraining.errors import NO_VALUE, mistake, nearest_name
from posttraining.evaluate.harness import HarnessSettings, check_harness, run_harness
from posttraining.evaluate.results import answers_file, read_results, write_answers, write_results
from posttraining.evaluate.scoring import Check, Mode, judge
from posttraining.files import own_work_folder, publish
from posttraining.generation import Backend, Generator, Prompt
from posttraining.model_folder import check_finite, check_length, check_model_folder
from posttraining.next_line import chat_command
from posttraining.prompt_length import check_prompts
from posttraining.report import all_tables
from posttraining.settings import load
from posttraining.tables import show_tables
from posttraining.tasks import arithmetic


@dataclass(kw_only=True)
class TaskSettings:
    """One task: problems, and how they are asked."""

    name: str
    """What tables call it."""
    data: DataSettings
    """Rows with `prompt` and `answer`; of a generated task, always its held-out problems."""
    mode: Mode = "think"
    """think or no_think: the chat template's; plain: the base model's own form, without a template."""
    check: Check = "exact"
    """exact: the last box holds the answer as it is written; math: math-verify finds the two equal."""
    temperature: float = 0.0
    """0: greedy; 1 with nothing cut: what training by reinforcement samples from."""
    samples: int = 1
    """Answers to each problem (avg@k)."""
    max_new_tokens: int
    """The longest answer, in tokens."""
    models: list[str] = field(default_factory=list)
    """Names of the models that are asked; a task whose models are not evaluated is left out. Empty: all are asked."""

    def __post_init__(self) -> None:
        check_prompts_alone(self.data, "mode")


@dataclass(kw_only=True)
class EvaluateSettings:
    """Keys of evaluate.yaml."""

    models: dict[str, str]
    """Name → folder in Hugging Face form. Tables keep the order, and compare each with the one before."""
    output_dir: str
    """The folder for results.json and answers/."""
    seed: int = 42
    """Of sampling."""
    batch_size: int = 128
    """Answers generated at a time."""
    backend: Backend = "auto"
    """vLLM or transformers; auto: vLLM where it is installed and there is a GPU."""
    dtype: str = "auto"
    """A torch dtype's name; auto: as the weights are stored."""
    cpu_threads: int | None = None
    """Threads that torch computes with on a CPU; null: as many as torch chooses."""
    tasks: list[TaskSettings] = field(default_factory=list)
    """The offline tasks."""
    harness: HarnessSettings | None = None
    """Tasks of the standard harness, which read data sets from the Hub."""


def run(config: str, overrides: Sequence[str] = ()) -> str:
    """Evaluate what the config names. Returns what to call next.

    Raises Mistake; StageFailed where the harness fails.
    """
    from posttraining.training import quiet

    (settings,), mapping = load(config, "evaluate", (EvaluateSettings,), overrides)
    _check(settings, config)
    quiet(settings.cpu_threads)
    target = Path(settings.output_dir)
    asked = {model: [task.name for task in settings.tasks if _asks(task, model)] for model in settings.models}
    weights = {model: lineage.weights_sha256(Path(folder)) for model, folder in settings.models.items()}
    with own_work_folder(target, {"config": mapping, "weights": weights}) as work:
        part = work / "scores"
        for model, folder in settings.models.items():
            _ask(settings, config, model, folder, part)
        harness = {
            name: run_harness(settings.harness, Path(folder), part / "harness" / name)
            for name, folder in (settings.models.items() if settings.harness else ())
        }
        write_results(part, asked, mapping, harness)
        publish(part, target)
        shutil.rmtree(work, ignore_errors=True)  # NFS keeps the lock while it is held
    results = read_results(target)
    show_tables(all_tables(results))
    print(f"evaluate: every answer with its text is in {target}")
    return chat_command(list(settings.models.values())[-1])


def _check(settings: EvaluateSettings, file: str) -> None:
    if not settings.models:
        raise mistake(file, "models", {}, "expected at least one, name: folder")
    if not settings.tasks and settings.harness is None:
        raise mistake(file, "tasks", [], "expected at least one task, or a section harness")
    names = [task.name for task in settings.tasks]
    for name in [*names, *settings.models]:
        if names.count(name) > 1 or not name.replace("-", "").replace("_", "").isalnum():
            raise mistake(file, "name", name, "expected letters, digits, - and _, and no name twice")
    if settings.batch_size < 1:
        raise mistake(file, "batch_size", settings.batch_size, "expected 1 or more")
    for task in settings.tasks:
        _check_task(task, settings, file)
    if settings.harness is None and not any(_asks(task, model) for task in settings.tasks for model in settings.models):
        meant = [name for task in settings.tasks for name in task.models]
        expected = f"no task is meant for any of the models: {', '.join(settings.models)}"
        raise mistake(file, "tasks.models", meant, expected)
    for folder in map(check_model_folder, settings.models.values()):
        for task in settings.tasks:
            check_length(folder, f"tasks: {task.name}: max_new_tokens", task.max_new_tokens, file)
        check_finite(folder)
    if settings.harness is not None:
        check_harness(settings.harness, file)


def _check_task(task: TaskSettings, settings: EvaluateSettings, file: str) -> None:
    for key, value in (("max_new_tokens", task.max_new_tokens), ("samples", task.samples)):
        if value < 1:
            raise mistake(file, f"tasks: {task.name}: {key}", value, "expected 1 or more")
    if not 0 <= task.temperature < math.inf:
        raise mistake(file, f"tasks: {task.name}: temperature", task.temperature, "expected a number from 0 on")
    for name in task.models:
        # A recipe's tasks for a base are left out where none is evaluated; a misspelling is not.
        nearest = nearest_name(name, settings.models)
        if name not in settings.models and nearest:
            expected = f"expected some of the models: {', '.join(settings.models)}"
            raise mistake(file, f"tasks: {task.name}: models", task.models, expected, nearest)
    if task.mode == "plain" and not task.data.generated:
        raise mistake(file, f"tasks: {task.name}: mode", task.mode, "only generated problems have a plain form")


def _asks(task: TaskSettings, model: str) -> bool:
    return not task.models or model in task.models


def _ask(settings: EvaluateSettings, file: str, model: str, folder: str, part: Path) -> None:
    todo = [
        task for task in settings.tasks if _asks(task, model) and not answers_file(part, model, task.name).is_file()
    ]
    if not todo:
        return
    generator = Generator(folder, settings.backend, settings.dtype, settings.batch_size)
    if not generator.tokenizer.chat_template:
        from posttraining.chat import prepare_tokenizer

        prepare_tokenizer(generator.tokenizer, generator.model if generator.backend == "transformers" else None)
    for task in todo:
        prompts, expected = _problems(task, file)
        template = None if task.mode == "plain" else {"enable_thinking": task.mode == "think"}
        where = f"{file}: tasks: {task.name}"
        check_prompts(Path(folder), generator.tokenizer, prompts, task.max_new_tokens, where, template)
        answers = generator(
            prompts * task.samples,
            max_new_tokens=task.max_new_tokens,
            temperature=task.temperature,
            seed=settings.seed,
            template=template,
        )
        expected *= task.samples
        scores = [
            judge(place % len(prompts), right, answer, task.mode, task.check)
            for place, (right, answer) in enumerate(zip(expected, answers, strict=True))
        ]
        write_answers(answers_file(part, model, task.name), scores, [answer.text for answer in answers])
        right = sum(score.right for score in scores)
        print(f"{model}: {task.name}: {right} of {len(scores)} answers right", flush=True)


def _problems(task: TaskSettings, file: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of a task and the answers that are right. Raises Mistake."""
    data = task.data
    if data.generated is None:
        rows = as_conversations(load_data(data, "prompts", file))
        if "answer" not in rows.column_names:
            raise mistake(file, f"tasks: {task.name}: data", NO_VALUE, "its rows have no 'answer'")
        if None in rows["answer"]:
            row = list(rows["answer"]).index(None)
            raise mistake(file, f"tasks: {task.name}: data: row {row}", NO_VALUE, "has no 'answer'")
        return list(rows["prompt"]), [str(answer) for answer in rows["answer"]]
    if data.examples is None or data.examples < 1:
        raise mistake(
            file, f"tasks: {task.name}: data.examples", data.examples, "expected how many problems, 1 or more"
        )
    problems = arithmetic.problems(data.seed, data.examples, "held_out")
    answers = [problem.answer for problem in problems]
    if task.mode == "plain":
        return [problem.plain_prompt for problem in problems], answers
    return [[{"role": "user", "content": problem.question}] for problem in problems], answers
