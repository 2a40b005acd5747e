"""What is measured of a checkpoint is what the run itself measures, and is recorded beside a training that goes on."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_pretraining import Process, pretrain_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.plan import DataPlan
from launch.cli.main import main
from launch.evaluate import job
from launch.evaluate.benchmarks import Benchmarks, BenchmarksFailed, run_benchmarks
from launch.evaluate.card_facts import facts_of_run
from launch.evaluate.checkpoint import exported
from launch.evaluate.offline import Request, check_device, evaluate_export
from launch.train.metrics import MetricsWriter, read_metrics
from launch.train.run_folder import RunFolder
from model.hf_folder import load_with_transformers
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe


@pytest.fixture(scope="module")
def evaluated(small_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was evaluated while it was trained; nobody changes it."""
    folder = tmp_path_factory.mktemp("evaluated")
    changes = ["lighteval.eval_interval=10", "lighteval.longest_wait_seconds=250", "tokens.val_check_interval=8"]
    settings = [word for change in changes for word in ("--set", change)]
    process = Process(pretrain_command(small_file, "--run", "a", *settings), folder, OMP_NUM_THREADS="1")
    code, out, err = process.end()
    assert code == 0, err
    (folder / "out").write_text(out)
    return folder


@pytest.fixture
def trained(evaluated: Path, tmp_path: Path) -> RunFolder:
    """A copy of the run for each test."""
    folder = shutil.copytree(evaluated, tmp_path / "evaluated", symlinks=True)
    return RunFolder.of(folder / "runs", "a", load_recipe(str(folder / "runs/a/recipe.yaml")).recipe)


def test_a_running_training_starts_evaluations_whose_losses_are_its_own(trained: RunFolder) -> None:
    metrics = read_metrics(trained.metrics_file)
    validated = {event["step"]: event["validation_loss"] for event in metrics.events if event["event"] == "validation"}
    evaluated = {event["step"]: event for event in metrics.events if event["event"] == "evaluation"}
    assert min(evaluated) == 16 and max(evaluated) == 40, "the first checkpoint from step 10 on, and the last"
    for step, event in evaluated.items():
        assert event["source_loss"] == pytest.approx(validated[step], abs=2e-5), step
        assert "arithmetic" not in event and (trained.logs / "evaluations" / f"{step}.log").is_file()
    assert [step.step for step in metrics.steps] == list(range(1, 41))
    board = EventAccumulator(str(trained.tensorboard / "evaluation")).Reload()
    assert board.Scalars("evaluation/loss/words")[-1].step == 40
    assert "evaluation: step 40 · words " in (trained.path.parents[1] / "out").read_text()
    assert not (trained.path / "failed").exists() and trained.completed_step() == 40


def test_a_corpus_whose_tokenizer_was_trained_again_changes_no_model(
    trained: RunFolder, small_folder: Path, tmp_path: Path
) -> None:
    before = (small_folder / "corpus/tokenizer/tokenizer.json").read_bytes()
    assert (trained.tokenizer / "tokenizer.json").read_bytes() == before
    other = json.loads(before)
    other["model"]["vocab"] |= {"!": other["model"]["vocab"]["?"], "?": other["model"]["vocab"]["!"]}
    corpus = shutil.copytree(small_folder / "corpus", tmp_path / "corpus")
    (corpus / "tokenizer/tokenizer.json").write_text(json.dumps(other))
    recipe = load_recipe(str(trained.recipe_file), [f"corpus.path={corpus}"]).recipe
    with exported(trained.checkpoints / "40", recipe, trained) as export:
        assert (export / "tokenizer.json").read_bytes() == before
        found = evaluate_export(export, Request(recipe, ("loss",)))
    assert found.left_out == {"loss": "the shards here were made with another tokenizer than the model's"}
    with exported(trained.checkpoints / "40", recipe, None) as export:
        assert (export / "tokenizer.json").read_bytes() != before


@pytest.fixture
def called(
    trained: RunFolder, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, str, str]]:
    """Call the command line in the folder of the run; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(trained.path.parents[1])
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["nanotron-recipes", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capfd.readouterr())

    return call


def test_the_command_prints_and_records_what_it_measures(
    trained: RunFolder, called: Callable[..., tuple[Any, str, str]]
) -> None:
    code, out, err = called("evaluate", "runs/a/checkpoints/8", "--batch-size", "5")
    assert code == 0, err
    event = read_metrics(trained.metrics_file).events[-1]
    assert (event["event"], event["step"], list(event["source_loss"])) == ("evaluation", 8, ["words", "numbers"])
    assert f"{event['source_loss']['words']:.4f}" in out
    assert "arithmetic: left out: the recipe trains on no generated sums" in out
    assert out.splitlines()[-1] == "next: nanotron-recipes status runs/a"
    code, _, err = called("evaluate", "a", "--tasks", "los")
    assert code == 2 and "did you mean loss?" in err
    before = trained.metrics_file.read_bytes()
    code, _, err = called("evaluate", "a", "--benchmarks", "arc:easy|0", "--tasks", "loss")
    expected = "error: --benchmarks: .venv-eval/bin/lighteval is missing; expected lighteval there: make eval-env\n"
    assert (code, err) == (2, expected) and trained.metrics_file.read_bytes() == before


def test_what_is_measured_is_recorded_under_the_step_whose_weights_it_is_of(
    trained: RunFolder, called: Callable[..., tuple[Any, str, str]]
) -> None:
    first, *_, last = trained.steps()
    assert called("export", f"runs/a/checkpoints/{first}", "runs/a/export")[0] == 0
    assert called("evaluate", "runs/a/export", "--tasks", "loss")[0] == 0
    assert read_metrics(trained.metrics_file).events[-1]["step"] == first != last
    before = trained.metrics_file.read_bytes()
    renamed = trained.checkpoints / "900"
    (trained.checkpoints / str(first)).rename(renamed)
    code, _, err = called("evaluate", "runs/a/checkpoints/900", "--tasks", "loss")
    renamed.rename(trained.checkpoints / str(first))
    assert code == 2 and f"the state after step {first}, called 900" in err
    code, out, _ = called("evaluate", "a", "--tasks", "arithmetic")
    assert code == 0 and out.splitlines()[-1] == "next: nothing is recorded, since nothing was measured"
    code, _, err = called("evaluate", "a", "--max-samples", "3")
    assert (code, err) == (2, "error: --max-samples: is about benchmarks; expected --benchmarks with it\n")
    assert trained.metrics_file.read_bytes() == before


def test_an_export_of_nobody_is_measured_and_not_recorded(
    trained: RunFolder, called: Callable[..., tuple[Any, str, str]]
) -> None:
    assert called("export", "a", "my-model")[0] == 0
    before = trained.metrics_file.read_bytes()
    code, out, err = called("evaluate", "my-model", "--tasks", "loss")
    assert code == 0, err
    assert "loss: left out: no recipe is known" in out and trained.metrics_file.read_bytes() == before


def test_without_document_masks_whole_windows_are_measured(trained: RunFolder) -> None:
    recipe = load_recipe(str(trained.recipe_file), ["model.model_config._use_doc_masking=false"]).recipe
    plan = DataPlan.from_recipe(recipe)
    with exported(trained.checkpoints / "40", recipe, None) as export:
        losses = evaluate_export(export, Request(recipe, ("loss",), 7)).source_loss
        model = load_with_transformers(export, "auto")
    (batch,) = plan.validation("words", plan.global_batch_size, micro_batch_size=24).micro_batches[:1]
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(batch.input_ids.copy())).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.target_ids.copy()).flatten(), reduction="none"
    )
    mask = torch.from_numpy(batch.target_mask).flatten()
    assert losses["words"] == pytest.approx(float(nll[mask].mean()), abs=1e-5)


@pytest.mark.parametrize("fault", ["no such step", "damaged"])
def test_a_failure_is_an_event_and_a_line(
    fault: str, trained: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "b"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(trained.recipe_file.read_text())
    if fault == "damaged":
        (run / "checkpoints" / "8").mkdir(parents=True)
        (run / "checkpoints" / "8" / "manifest.json").write_text("{}")
    assert job.main([str(run), "8"]) == 1
    (event,) = read_metrics(run / "metrics.jsonl").events
    assert event["event"] == "evaluation" and event["step"] == 8 and event["error"]
    assert "failed: " in capfd.readouterr().out.splitlines()[-1]
    assert job.main([str(run)]) == 2 and job.main([str(tmp_path / "none"), "8"]) == 2


def test_an_evaluation_that_is_told_to_end_leaves_no_files(trained: RunFolder, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = (
        "import os, signal, sys, launch.evaluate.checkpoint as c, launch.evaluate.job as job\n"
        "c.evaluate_export = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.exit(job.main([{str(trained.path)!r}, '40', '--launcher', str(os.getppid())]))"
    )
    process = Process([sys.executable, "-P", "-c", code], tmp_path, TMPDIR=str(scratch))
    code_, _, err = process.end()
    assert code_ == job.TERMINATED, err
    assert list(scratch.iterdir()) == []


def test_the_card_reads_all_evaluations_of_a_step(trained: RunFolder) -> None:
    writer = MetricsWriter(trained.metrics_file)
    writer.on_event({"event": "evaluation", "step": 39, "bigram_bits_per_byte": {"words": 2.5}})
    writer.on_event({"event": "evaluation", "step": 39, "arithmetic": {"correct": 1, "total": 4}})
    writer.on_event({"event": "validation", "step": 39, "validation_loss": {"words": 1.0}})
    writer.close()
    recipe = load_recipe(str(trained.recipe_file)).recipe
    facts = facts_of_run(trained, recipe, 39)
    assert facts.arithmetic is not None and facts.validation[0].bigram_bits_per_byte == 2.5


def lighteval(folder: Path, lines: str) -> Path:
    program = folder / "lighteval"
    program.write_text(f"#!{sys.executable}\nimport json, pathlib, sys\n{lines}\n")
    program.chmod(0o755)
    return program


def test_benchmarks_are_run_by_lightevals_own_program_and_its_results_read(tmp_path: Path) -> None:
    results = {"results": {"arc:easy|0": {"acc": 0.25, "acc_stderr": 0.01, "name": "x"}, "all": {"acc": 0.25}}}
    program = lighteval(
        tmp_path,
        "out = pathlib.Path(sys.argv[5], 'results/m'); out.mkdir(parents=True)\n"
        "(out / 'args').write_text(json.dumps(sys.argv[1:]))\n"
        f"(out / 'results_2026.json').write_text(json.dumps({results!r}))",
    )
    found = run_benchmarks(Path("export"), Benchmarks("arc:easy|0", 10), tmp_path / "out", 4, program)
    assert found == {"arc:easy|0": {"acc": 0.25, "acc_stderr": 0.01}, "all": {"acc": 0.25}}
    assert json.loads((tmp_path / "out/results/m/args").read_text()) == [
        "accelerate", "model_name=export,batch_size=4", "arc:easy|0",
        "--output-dir", str(tmp_path / "out"), "--max-samples", "10",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"), [("sys.exit(3)", "exit code 3"), ("", "left no results")], ids=["fails", "says nothing"]
)
def test_a_lighteval_that_fails_is_said(lines: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarksFailed, match=message):
        run_benchmarks(Path("e"), Benchmarks("arc:easy|0"), tmp_path, 1, lighteval(tmp_path, lines))


@pytest.mark.parametrize(("mode", "why"), [(0o755, "ended with exit code 3"), (0o644, "cannot be started: Permission")])
def test_what_was_measured_without_lighteval_is_shown_and_recorded_where_that_fails(
    mode: int, why: str, trained: RunFolder, called: Callable[..., tuple[Any, str, str]]
) -> None:
    folder = Path(".venv-eval/bin")
    folder.mkdir(parents=True)
    lighteval(folder, "sys.exit(3)").chmod(mode)
    code, out, err = called("evaluate", "a", "--benchmarks", "arc:easy|0", "--tasks", "loss")
    event = read_metrics(trained.metrics_file).events[-1]
    assert code == 1 and err.splitlines()[-1].startswith("error: ") and why in err
    assert event["step"] == 40 and why in event["error"] and f"{event['source_loss']['words']:.4f}" in out


def test_an_evaluation_of_a_run_whose_lighteval_fails_records_the_losses_and_the_error(
    trained: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "b"
    shutil.copytree(trained.path, run)
    (run / "metrics.jsonl").unlink()
    recipe = load_recipe(str(trained.recipe_file), ["lighteval.tasks.tasks=arc:easy|0"]).recipe
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    monkeypatch.chdir(tmp_path)
    assert job.main([str(run), "40", "--benchmarks"]) == 1
    (event,) = read_metrics(run / "metrics.jsonl").events
    assert list(event["source_loss"]) == ["words", "numbers"]
    assert event["error"] == ".venv-eval/bin/lighteval is missing: make eval-env"
    assert capfd.readouterr().out.splitlines()[-1].endswith(f" · failed: {event['error']}")


def test_an_evaluation_of_a_run_asks_for_the_benchmarks_and_samples_of_its_recipe(
    trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["lighteval.tasks.tasks=arc:easy|0", "lighteval.tasks.max_samples=7"]
    trained.recipe_file.write_text(dump_yaml(load_recipe(str(trained.recipe_file), changes).recipe))
    folder = tmp_path / ".venv-eval" / "bin"
    folder.mkdir(parents=True)
    lighteval(folder, f"pathlib.Path({str(tmp_path)!r}, 'args').write_text(json.dumps(sys.argv[1:])); sys.exit(3)")
    monkeypatch.chdir(tmp_path)
    assert job.main([str(trained.path), "40", "--benchmarks"]) == 1
    words = json.loads((tmp_path / "args").read_text())
    assert words[2] == "arc:easy|0" and words[-2:] == ["--max-samples", "7"]


@pytest.mark.parametrize("config", ['{"model_type": "llama", "hidden_size": 8}', "{}"])
def test_a_damaged_export_and_a_device_that_is_not_there_are_refused_in_one_line(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"12345678" * 4)
    with pytest.raises(UserError, match="transformers cannot read the model"):
        load_with_transformers(tmp_path, "auto")
    with pytest.raises(UserError, match="--device nowhere: "):
        check_device("nowhere")
