"""What an evaluation leaves: `results.json` with every figure, and every answer in `answers/<model>.<task>.jsonl`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, mistake
from posttraining.evaluate.scoring import Estimate, Score, Summary, summarize
from posttraining.files import write_whole

RESULTS, ANSWERS = "results.json", "answers"
FORMAT = 1


@dataclass(frozen=True)
class Results:
    """One evaluation, read back."""

    folder: Path
    summaries: dict[str, dict[str, Summary]]
    """Model → task → figures, in the order in which they were asked for."""
    harness: dict[str, dict[str, dict[str, float]]]
    """Model → task of the standard harness → metric → value; empty where it was not asked."""

    def scores(self, model: str, task: str) -> list[Score]:
        """Every judged answer, in the order of the problems."""
        return read_answers(answers_file(self.folder, model, task))


def answers_file(folder: Path, model: str, task: str) -> Path:
    """Where the answers of one model to one task lie."""
    return folder / ANSWERS / f"{model}.{task}.jsonl"


def write_answers(file: Path, scores: Sequence[Score], texts: Sequence[str]) -> None:
    """Write judged answers with their text, one JSON object a line."""
    lines = [json.dumps(asdict(score) | {"text": text}) for score, text in zip(scores, texts, strict=True)]
    write_whole(file, "".join(f"{line}\n" for line in lines))


def read_answers(file: Path) -> list[Score]:
    """The judged answers of a file."""
    scores = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        record.pop("text")
        scores.append(Score(**record))
    return scores


def write_results(
    folder: Path, asked: Mapping[str, Sequence[str]], config: Mapping[str, Any], harness: Mapping[str, Any]
) -> None:
    """Write results.json from the answers in `folder`. `asked`: model → tasks. `config`: what was asked, as given."""
    summaries = {
        model: {task: asdict(summarize(read_answers(answers_file(folder, model, task)))) for task in tasks}
        for model, tasks in asked.items()
    }
    content = {"format": FORMAT, "config": dict(config), "scores": summaries, "harness": dict(harness)}
    write_whole(folder / RESULTS, json.dumps(content, indent=2) + "\n")


def read_results(folder: Path) -> Results:
    """Read an evaluation. Raises Mistake where `folder` holds none."""
    file = folder / RESULTS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        summaries = {
            model: {task: _summary(figures) for task, figures in tasks.items()}
            for model, tasks in content["scores"].items()
        }
        return Results(folder, summaries, content["harness"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise mistake(file, None, NO_VALUE, f"is no evaluation ({type(error).__name__})") from error


def _summary(figures: Mapping[str, Any]) -> Summary:
    estimates = {name: Estimate(**figures[name]) for name in ("accuracy", "format", "tokens", "ended")}
    return Summary(n=figures["n"], **estimates)
