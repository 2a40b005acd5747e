"""Evaluation of whole folders: what is asked, what is written, what a restart keeps, and what is refused."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import write_base, write_chat

from posttraining.cli import main
from posttraining.datasets import DataSettings
from posttraining.errors import Mistake
from posttraining.evaluate import scoring, stage
from posttraining.evaluate.results import read_results
from posttraining.files import own_work_folder
from posttraining.report import all_tables, gains_table, scores_table
from posttraining.tasks.arithmetic import is_held_out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"base": str(write_base(folder / "base")), "chat": str(write_chat(folder / "chat"))}


def task(name: str, **keys: Any) -> dict[str, Any]:
    data = {"generated": "arithmetic", "examples": 6}
    return {"name": name, "data": data, "max_new_tokens": 5, **keys}


def config(tmp_path: Path, models: dict[str, str], tasks: list[dict[str, Any]], **keys: Any) -> str:
    content = {"models": models, "tasks": tasks, "output_dir": str(tmp_path / "scores"), "cpu_threads": 1, **keys}
    (tmp_path / "evaluate.yaml").write_text(json.dumps(content))
    return str(tmp_path / "evaluate.yaml")


def refused(capsys: pytest.CaptureFixture[str], file: str) -> str:
    """The one line with which the command line refuses."""
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", file])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    return error


def test_every_model_is_asked_every_task_meant_for_it(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [
        task("greedy"),
        task("sampled", temperature=1.0, samples=2),
        task("plain", mode="plain", models=["base"]),
        task("short", mode="no_think", models=["chat"]),
    ]
    stage.run(config(tmp_path, models, tasks))
    results = read_results(tmp_path / "scores")
    assert {name: list(asked) for name, asked in results.summaries.items()} == {
        "base": ["greedy", "sampled", "plain"],
        "chat": ["greedy", "sampled", "short"],
    }
    assert len(results.scores("chat", "sampled")) == 12
    assert results.summaries["chat"]["sampled"].n == 6
    out = capsys.readouterr().out
    assert "chat   short" in out and "| chat | short" not in out, "a terminal is drawn tables, files have markdown"
    assert "| chat | short |" in scores_table(results)
    assert "| base → chat | greedy |" in gains_table(results)
    assert not list(tmp_path.glob(".scores*"))


def test_a_task_whose_models_are_not_evaluated_is_left_out(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [task("greedy"), task("plain", mode="plain", models=["base"])]
    stage.run(config(tmp_path, {"chat": models["chat"]}, tasks))
    assert {name: list(asked) for name, asked in read_results(tmp_path / "scores").summaries.items()} == {
        "chat": ["greedy"]
    }
    assert "chat: greedy: 0 of 6 answers right" in capsys.readouterr().out


def test_a_base_model_gets_a_template_to_be_asked_with_and_its_folder_is_left_alone(
    models: dict[str, str], tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in Path(models["base"]).iterdir()}
    stage.run(config(tmp_path, {"base": models["base"]}, [task("greedy")]))
    assert {file.name: file.read_bytes() for file in Path(models["base"]).iterdir()} == before


def test_two_evaluations_with_one_seed_are_equal(models: dict[str, str], tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        file = config(tmp_path, {"chat": models["chat"]}, [task("sampled", temperature=1.0)])
        stage.run(file, [f"output_dir={tmp_path / name}"])
        written.append((tmp_path / name / "answers" / "chat.sampled.jsonl").read_bytes())
    assert written[0] == written[1]


def test_a_killed_evaluation_keeps_what_it_had(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, {"chat": models["chat"]}, [task("first"), task("second")])
    asked: list[int] = []
    last_before_the_kill = 7

    def judge_or_die(*arguments: Any) -> Any:
        asked.append(len(asked))
        if len(asked) > last_before_the_kill:
            raise KeyboardInterrupt
        return scoring.judge(*arguments)

    monkeypatch.setattr(stage, "judge", judge_or_die)
    with pytest.raises(KeyboardInterrupt):
        stage.run(file)
    assert not (tmp_path / "scores").exists()
    asked.clear()
    stage.run(file)
    assert len(asked) == 6
    assert list(read_results(tmp_path / "scores").summaries["chat"]) == ["first", "second"]


def test_a_work_folder_that_cannot_be_removed_spoils_no_evaluation(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = os.rmdir

    def refuse(path: str, **keys: Any) -> None:
        if str(path).endswith(".scores.work"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        remove(path, **keys)

    monkeypatch.setattr(os, "rmdir", refuse)  # as NFS does while the lock is held
    stage.run(config(tmp_path, {"chat": models["chat"]}, [task("greedy")]))
    assert read_results(tmp_path / "scores").summaries["chat"]["greedy"].n == 6


def test_generated_problems_are_held_out_by_the_hash_rule() -> None:
    for mode in ("think", "plain"):
        data = DataSettings(generated="arithmetic", examples=50)
        prompts, answers = stage._problems(stage.TaskSettings(name="a", data=data, mode=mode, max_new_tokens=5), "file")
        for prompt, answer in zip(prompts, answers, strict=True):
            text = prompt if isinstance(prompt, str) else prompt[0]["content"]
            left, sign, right = re.search(r"(\d+)([+-])(\d+)", text).groups()  # type: ignore[union-attr]
            assert is_held_out(int(left), sign, int(right))
            assert int(answer) == (int(left) + int(right) if sign == "+" else int(left) - int(right))


def test_a_file_of_questions_is_asked_as_chats(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"problem": "1+1?", "answer": 2}) + "\n")
    data = DataSettings(path=str(file), columns={"problem": "prompt"})
    asked = stage._problems(stage.TaskSettings(name="a", data=data, max_new_tokens=5), "file")
    assert asked == ([[{"role": "user", "content": "1+1?"}]], ["2"])
    data.columns = {"problems": "prompt"}
    with pytest.raises(Mistake, match=r"data.columns: 'problems': no such column; .* did you mean problem"):
        stage._problems(stage.TaskSettings(name="a", data=data, max_new_tokens=5), "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "tasks: []: expected at least one task"),
        ({"models": {}}, "models: {}: expected at least one"),
        (
            {"tasks": [task("a", models=["base"])]},
            "tasks.models: ['base']: no task is meant for any of the models: chat",
        ),
        ({"models": {"chat": "/nowhere"}}, "/nowhere: no such folder"),
        ({"tasks": [task("a"), task("a")]}, "name: 'a': expected letters, digits"),
        ({"tasks": [task("a", max_new_tokens=999)]}, "max_new_tokens: 999: expected at most 256"),
        ({"tasks": [task("a", samples=0)]}, "samples: 0: expected 1 or more"),
        ({"tasks": [task("a", mood="plain")]}, "mood: unknown key; did you mean tasks.0.mode?"),
        ({"harness": {"tasks": "aime25|0", "lighteval": "no-such-program"}}, "'no-such-program': no such program"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    keys: dict[str, Any] = {"models": {"chat": models["chat"]}, "tasks": [task("greedy")], **change}
    assert message in refused(capsys, config(tmp_path, **keys))


def test_a_second_evaluation_into_one_folder_is_refused_while_the_first_runs(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, models, [task("greedy")])
    with own_work_folder(Path(yaml.safe_load(Path(file).read_text())["output_dir"]), {}):
        assert "is being written by another process" in refused(capsys, file)


def test_a_folder_that_is_taken_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    file = config(tmp_path, {"chat": models["chat"]}, [task("greedy")])
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "note").touch()
    with pytest.raises(Mistake, match="is there already"):
        stage.run(file)


FAKE_LIGHTEVAL = """#!/usr/bin/env python3
import json, pathlib, sys
assert sys.argv[1] == "accelerate" and sys.argv[3] == "aime25|0", sys.argv
assert pathlib.Path("model/config.json").is_file() and pathlib.Path(sys.argv[2]).is_file()
output = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1], "results", "model")
output.mkdir(parents=True)
results = {"aime25|0": {"avg@64": 0.25, "note": "text"}}
(output / "results_2026.json").write_text(json.dumps({"results": results, "argv": sys.argv}))
"""


def test_the_harness_is_asked_for_each_model_with_its_thoughts_stripped(models: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "lighteval"
    program.write_text(FAKE_LIGHTEVAL)
    program.chmod(0o755)
    harness = {"tasks": "aime25|0", "lighteval": str(program), "max_samples": 3, "system_prompt": "/no_think"}
    stage.run(config(tmp_path, models, [], harness=harness))
    results = read_results(tmp_path / "scores")
    assert results.harness == {name: {"aime25|0": {"avg@64": 0.25}} for name in models}
    assert "| aime25:0 | avg@64 | 0.25 | 0.25 |" in all_tables(results)
    (written,) = (tmp_path / "scores" / "harness" / "chat").rglob("results_*.json")
    words = json.loads(written.read_text())["argv"]
    asked = yaml.safe_load((tmp_path / "scores" / "harness" / "chat" / "model.yaml").read_text())["model_parameters"]
    assert (asked["model_name"], asked["cache_dir"]) == ("model", "cache") and asked["system_prompt"] == "/no_think"
    assert asked["generation_parameters"] == {"max_new_tokens": 32768, "temperature": 0.6, "top_p": 0.95}
    assert "--remove-reasoning-tags" in words
    assert words[words.index("--max-samples") + 1] == "3"
