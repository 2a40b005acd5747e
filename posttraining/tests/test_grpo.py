"""GRPO on a model of a few thousand parameters: what it leaves, what it starts from, and how it goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import write_base, write_chat
from transformers import TrainerCallback

from posttraining import grpo, lineage, training
from posttraining.alarms import LENGTH
from posttraining.cli import main
from posttraining.errors import StageFailed
from posttraining.generation import Generator


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("model") / "chat")


def tokens_below_200(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with some spread for a model that writes noise."""
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def config(tmp_path: Path, start: Path, /, **changes: Any) -> str:
    content: dict[str, Any] = {
        "model": str(start),
        "output_dir": str(tmp_path / "grpo"),
        "seed": 1,
        "cpu_threads": 1,
        "use_cpu": True,
        "data": {"generated": "arithmetic", "examples": 20},
        "rewards": [
            {"path": "test_grpo.tokens_below_200"},
            {
                "path": "posttraining.rewards.soft_overlong_penalty",
                "weight": 0.5,
                "arguments": {"max_completion_len": 6, "soft_punish_cache": 4},
            },
        ],
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
    }
    file = tmp_path / "grpo.yaml"
    file.write_text(json.dumps(content | changes))
    return str(file)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command line refuses."""
    with pytest.raises(SystemExit) as ended:
        main(["grpo", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    return error.strip().splitlines()[-1]


def test_a_trained_model_has_its_lineage_its_log_and_stops_at_the_end_of_a_turn(chat: Path, tmp_path: Path) -> None:
    grpo.run(config(tmp_path, chat))
    folder = tmp_path / "grpo"
    last = lineage.read(folder)[-1]  # type: ignore[index]
    assert (last["stage"], last["parent"]) == ("grpo", lineage.weights_sha256(chat))
    assert lineage.matches_weights(folder)
    assert last["config"]["learning_rate"] == 1e-2 and "forced" not in last
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = next(record for record in log if record.get("step") == 1 and "reward" in record)
    names = ("tokens_below_200", "soft_overlong_penalty")
    first, second = (record[f"rewards/{name}/mean"] for name in names)
    assert record["reward"] == pytest.approx(first + 0.5 * second, abs=1e-6)
    before, after = load_file(chat / "model.safetensors"), load_file(folder / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    generator = Generator(str(folder))
    end = generator.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stops = generator.model.generation_config.eos_token_id
    assert end in stops and generator.tokenizer.pad_token_id not in stops
    assert not list(tmp_path.glob(".grpo*"))


def test_the_recipe_for_smollm3_takes_two_steps_at_tiny_size(chat: Path, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    rows = [{"problem": f"{number}+1?", "answer": str(number + 1), "domain": ["sums"]} for number in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    smaller = {
        "model": str(chat),
        "output_dir": str(tmp_path / "grpo"),
        "data.path": str(file),
        "model_init_kwargs": "{dtype: float32}",
        "max_completion_length": 6,
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "use_vllm": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    grpo.run("smollm3", [f"{key}={value}" for key, value in smaller.items()])
    log = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if "reward" in record] == [1, 2]
    assert {"rewards/math_accuracy/mean", "rewards/soft_overlong_penalty/mean", "rewards/waits/mean"} <= set(log[0])


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert training.last_whole_checkpoint(tmp_path) is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert training.last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


class Killed(Exception):
    """Stands for a signal that no handler sees."""


class Kill(TrainerCallback):
    """Ends training as a kill would, after the checkpoint of a step."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise Killed


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grpo.run(config(tmp_path, chat))
    whole = lineage.weights_sha256(tmp_path / "grpo")
    log = (tmp_path / "grpo" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "grpo")
    build = grpo.build

    def build_to_be_killed(*arguments: Any) -> Any:
        built = build(*arguments)
        built[0].add_callback(Kill())
        return built

    with monkeypatch.context() as patched:
        patched.setattr(grpo, "build", build_to_be_killed)
        with pytest.raises(Killed):
            grpo.run(config(tmp_path, chat))
    assert not (tmp_path / "grpo").exists()
    grpo.run(config(tmp_path, chat))
    assert lineage.weights_sha256(tmp_path / "grpo") == whole
    rewards = [
        [record["reward"] for record in map(json.loads, text.splitlines()) if "reward" in record]
        for text in (log, (tmp_path / "grpo" / "metrics.jsonl").read_text())
    ]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 3


def test_an_alarm_ends_training_and_the_stage_fails(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, chat, alarms={"window": 1, "length_growth": 0.5})
    with pytest.raises(StageFailed, match=f"alarm at step 2: {LENGTH} is .* above"):
        grpo.run(file)
    assert not (tmp_path / "grpo").exists()
    (rung,) = (tmp_path / ".grpo.work" / "alarms.jsonl").read_text().splitlines()
    assert json.loads(rung)["step"] == 2
    with pytest.raises(SystemExit) as ended:
        main(["grpo", file])
    assert ended.value.code == 1
    assert "failed: alarm at step 2" in capsys.readouterr().err


def test_a_base_model_is_refused_with_the_stage_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    assert "the stage sft is missing (it had pretrain)" in refused(capsys, config(tmp_path, base))
    assert not list(tmp_path.glob(".grpo*"))


def test_edited_weights_and_a_missing_lineage_are_refused(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(chat, edited)
    content = bytearray((edited / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (edited / "model.safetensors").write_bytes(content)
    assert "its weights are not those that training_lineage.json names" in refused(capsys, config(tmp_path, edited))
    (edited / lineage.FILE).unlink()
    assert "has no training_lineage.json" in refused(capsys, config(tmp_path, edited))


def test_force_lets_it_pass_and_its_reason_is_recorded(chat: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(chat, bare)
    (bare / lineage.FILE).unlink()
    grpo.run(config(tmp_path, bare, max_steps=1), (), "weights from a partner")
    assert lineage.read(tmp_path / "grpo")[-1]["forced"] == "weights from a partner"  # type: ignore[index]


def test_force_does_not_replace_a_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    said = refused(capsys, config(tmp_path, base), "--force", "weights from a partner")
    assert said == f"error: {base}: its tokenizer has no chat template; run `posttraining sft` on it first"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [{"path": "no.such.reward"}]}, "rewards.0.path: 'no.such.reward': does not import"),
        ({"rewards": []}, "rewards: []: expected at least one"),
        ({"reward_weights": [1.0]}, "reward_weights: expected as `weight` of each of the rewards"),
        ({"max_completion_length": 999}, "max_completion_length: 999: expected at most 256"),
        ({"num_generation": 4}, "num_generation: unknown key; did you mean num_generations?"),
        ({"data": {"path": "nothing.jsonl"}}, "data.path: 'nothing.jsonl': no such file"),
        ({"alarms": {"action": "shout"}}, "alarms.action: 'shout': expected stop or warn"),
        ({"per_device_train_batch_size": 6}, "num_generations"),
        ({"model": "/nowhere"}, "/nowhere: no such folder"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    error = refused(capsys, config(tmp_path, chat, **change))
    assert error.startswith("error: ") and message in error
