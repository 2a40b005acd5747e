"""Somebody is told of a failure or a sustained drop, by a POST to a URL that no file of the run holds."""

import json
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from launch.status.speed import SpeedWatch
from launch.train.metrics import Event, StepRecord
from launch.train.outage import Outage
from launch.train.streams import say
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import sequence_length_at

AlarmName = Literal["failed", "gave_up", "slow"]
TIMEOUT_SECONDS = 5.0
"""For an answer. Looking up a name may take longer: nothing waits for it but a thread."""


class NotTold(OSError):
    """A webhook did not take a message. What it says holds nothing of the URL."""


class Webhook:
    """Posts {"run", "event", "step", "message"} from a thread; whatever the other side does, the training goes on.

    Used in a `with` statement, at whose end what is still to be sent has a few seconds.
    """

    def __init__(self, url: str | None, run: str, tell: Callable[[str], None] = say) -> None:
        """`url`: None sends nothing. `tell` is given a line when the webhook takes nothing, and when it does again."""
        self._url = url
        self._run = run
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._outage = Outage("the webhook", "training goes on, and nobody is told", "it takes messages again", tell)
        self._thread: threading.Thread | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        run: str,
        tell: Callable[[str], None] = say,
        environment: Mapping[str, str] = os.environ,
    ) -> Self:
        """The webhook of the recipe's `logging.webhook_variable`; where that variable holds no URL, `tell` says so."""
        name = recipe.logging.webhook_variable
        url = environment.get(name, "").strip() if name is not None else ""
        if name is not None and not url.startswith(("http://", "https://")):
            what = "holds no http(s) URL" if url else "is not set"
            tell(f"logging.webhook_variable: the environment variable {name} {what}: nothing will be posted")
            url = ""
        return cls(url or None, run, tell)

    def send(self, event: AlarmName, step: int | None, message: str) -> None:
        """Have a message posted; returns at once."""
        if self._url is None:
            return
        self._messages.put({"run": self._run, "event": event, "step": step, "message": message})
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._url,), name="webhook", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Give what is still to be sent a few seconds, and end."""
        if self._thread is not None:
            self._messages.put(None)
            self._thread.join(TIMEOUT_SECONDS + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self, url: str) -> None:
        while (message := self._messages.get()) is not None:
            try:
                _post(url, message)
            except NotTold as error:
                self._outage.failed(error)
            else:
                self._outage.succeeded()


def _post(url: str, message: Mapping[str, Any]) -> None:
    """Raises NotTold; neither that nor its cause is to be shown in full, which may hold the URL."""
    try:
        body = json.dumps(message).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        raise NotTold(f"answers {error.code}") from None
    except Exception as error:  # of the network, of the name, of the URL: each module has its own kinds
        raise NotTold(f"cannot be reached ({type(error).__name__})") from None


class SpeedAlarm:
    """A callback that posts when the run has become slow: once for each drop."""

    def __init__(self, webhook: Webhook, recipe: Recipe) -> None:
        self._webhook = webhook
        self._watch = SpeedWatch(lambda step: sequence_length_at(recipe, step))

    def on_step(self, record: StepRecord) -> None:
        """Note a step's speed."""
        drop = self._watch.observe(record)
        if drop is not None:
            self._webhook.send("slow", record.step, str(drop))

    def on_event(self, event: Event) -> None:
        """Other records are of no concern."""

    def close(self) -> None:
        """End the webhook's thread."""
        self._webhook.close()
