"""Somebody is told of failures and drops; the other side can hurt no training, and its URL stands nowhere."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from small_pretraining import StartProcess
from test_guards_run import run_planted

from launch.cluster import job
from launch.train import webhook as webhook_module
from launch.train.metrics import StepRecord
from launch.train.run_folder import RunFolder, RunHeader
from launch.train.webhook import SpeedAlarm, Webhook
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe

SECRET = "s3cr3t-token"
VARIABLE = "TEAM_WEBHOOK"
SETTING = f"logging.webhook_variable={VARIABLE}"


class Receiver:
    """A real server on this machine that keeps what it is sent."""

    def __init__(self, code: int = 200, seconds: float = 0.0) -> None:
        receiver, self.messages = self, []  # type: ignore[var-annotated]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.messages.append((self.path, self.headers["Content-Type"], json.loads(body)))
                time.sleep(seconds)
                self.send_response(code)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Receiver()
    yield server
    server.close()


def test_a_message_is_posted_as_json(receiver: Receiver) -> None:
    with Webhook(receiver.url, "tiny-1") as webhook:
        webhook.send("failed", 7, "the loss was not finite")
    message = {"run": "tiny-1", "event": "failed", "step": 7, "message": "the loss was not finite"}
    assert receiver.messages == [(f"/{SECRET}", "application/json", message)]


def test_a_server_that_is_gone_refuses_or_sleeps_is_said_once_and_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    refusing, sleeping, gone = Receiver(code=500), Receiver(seconds=3.0), Receiver()
    gone.close()
    monkeypatch.setattr("launch.train.webhook.TIMEOUT_SECONDS", 0.3)
    said: list[str] = []
    post, posting = webhook_module._post, set[str]()

    def seen(url: str, message: Mapping[str, Any]) -> None:
        posting.add(threading.current_thread().name)
        post(url, message)

    monkeypatch.setattr(webhook_module, "_post", seen)
    for url in (refusing.url, sleeping.url, gone.url, f"http://no such host/{SECRET}"):
        with Webhook(url, "r", said.append) as webhook:
            for step in range(3):
                webhook.send("slow", step, "m")
    assert posting == {"webhook"}, "no other thread waits"
    assert len(said) == 4 and said[0].startswith("the webhook: answers 500; training goes on")
    assert not any(SECRET in line or "127.0.0.1" in line for line in said)
    refusing.close(), sleeping.close()


def test_a_variable_that_holds_nothing_useful_is_said_without_what_it_holds() -> None:
    recipe, said = load_recipe("tiny", [SETTING]).recipe, []  # type: ignore[var-annotated]
    for environment in ({}, {VARIABLE: f"ftp://{SECRET}"}, {VARIABLE: ""}):
        Webhook.of(recipe, "r", said.append, environment).send("slow", 1, "m")
    assert [VARIABLE in line and "nothing will be posted" in line for line in said] == [True] * 3
    assert SECRET not in "".join(said)
    assert Webhook.of(load_recipe("tiny").recipe, "r", said.append, {}) and len(said) == 3


@pytest.mark.parametrize("place", ["override", "file"])
def test_a_url_in_a_recipe_is_refused_and_not_repeated(tmp_path: Path, place: str) -> None:
    url = f"https://hooks/{SECRET}"
    file = tmp_path / "mine.yaml"
    recipe = dump_yaml(load_recipe("tiny").recipe).replace("webhook_variable: null", f"webhook_variable: {url}")
    file.write_text(recipe)
    arguments = ("tiny", [f"logging.webhook_variable={url}"]) if place == "override" else (str(file), [])
    with pytest.raises(UserError, match=r"logging.webhook_variable: '\(hidden\)': expected the name of") as refused:
        load_recipe(*arguments)
    assert SECRET not in str(refused.value)


def test_a_sustained_drop_is_told_once(receiver: Receiver) -> None:
    recipe = load_recipe("tiny").recipe
    alarm = SpeedAlarm(Webhook(receiver.url, "tiny-1"), recipe)
    for step, speed in enumerate([1000.0] * 60 + [500.0] * 60, 1):
        values: dict[str, Any] = {"step": step, "tokens": step, "loss": 1.0, "lr": 0.0, "grad_norm": 1.0}
        values |= {"tokens_per_second": speed, "step_seconds": 1.0, "data_wait_seconds": 0.0}
        alarm.on_step(StepRecord(**values, memory_peak_bytes=1, mfu=None, stage="stable"))
    alarm.close()
    ((_, _, message),) = receiver.messages
    assert (message["event"], message["step"]) == ("slow", 70) and "since step 61" in message["message"]


def test_a_job_that_gives_up_is_told(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, receiver.url)
    recipe = load_recipe("tiny", [SETTING]).recipe
    folder = RunFolder.of(tmp_path, "a", recipe)
    place = folder.jobs / "1"
    place.mkdir(parents=True)
    (place / "tiny.yaml").write_text(dump_yaml(recipe))
    folder.write_recipe(dump_yaml(recipe), RunHeader("tiny", "0", "f"))
    folder.mark_failed("replicas", 3, "after step 3 the copies of parameters differ")
    assert job.main(["end", str(place), "--job-id", "41", "--restart", "0"]) == 1
    ((_, _, message),) = receiver.messages
    assert message["event"] == "gave_up" and "copies of parameters differ" in message["message"]
    assert SECRET not in capsys.readouterr().out


def test_a_run_that_fails_tells_it_and_no_file_holds_the_url(
    receiver: Receiver,
    small_file: Path,
    start_process: StartProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, receiver.url)
    settings = (SETTING, "guards.max_skipped_steps=2", "tokens.val_check_interval=0")
    code, out, err = run_planted(start_process, tmp_path, "nan_now_and_then", small_file, *settings)
    assert code == 1, err
    ((_, _, message),) = receiver.messages
    assert (message["run"], message["event"], message["step"]) == ("planted", "failed", 6)
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 4 and VARIABLE.encode() in b"".join(written)
    assert not any(SECRET.encode() in text for text in [*written, out.encode(), err.encode()])
