"""The uploader of a disk, as the launch sees it: started, looked at, started again where it died, ended.

Imports no torch.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from launch.storage.backlog import beyond_backlog
from launch.storage.remote import local_identity
from launch.storage.state import Checkpoint, GivenUp, NodeState, Uploaded, log_file, read_state
from launch.train.metrics import Event
from launch.train.retention import Uploading
from launch.train.run_folder import RunFolder
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    from parallel.checkpoint_disks import Disks

_LOOK_SECONDS = 0.5
_AGAIN_SECONDS = 30.0
_TELL_SECONDS, _FIRST_TELL_SECONDS = 30.0, 2.0
_ENDS_SECONDS = 5.0


class Uploads:
    """The uploader of this rank's disk; made by the first rank of each."""

    def __init__(self, folder: RunFolder, recipe: Recipe, node: str, nodes: tuple[str, ...], launch_id: str) -> None:
        """
        Args:
            folder: as this node sees it.
            node: the name of this disk's node.
            nodes: those of all disks.
        """
        assert recipe.s3_upload is not None
        self._folder, self._upload, self._node = folder, recipe.s3_upload, node
        self._launch_id = launch_id
        words = [str(folder.recipe_file), "--node", node, "--nodes", ",".join(nodes), "--launch-id", launch_id]
        self._command = [sys.executable, "-P", "-m", "launch.storage.uploader", *words]
        self._began = time.time()
        self._state: NodeState | None = None
        self._before = read_state(folder.path, node)
        """What the uploader of an earlier launch knew, as long as this one's has not said anything."""
        self._given_up: dict[Checkpoint, GivenUp] = {}
        """That the uploader has not confirmed."""
        self._look_at = self._start_at = 0.0
        self._told: set[Uploaded | GivenUp] = set(self._before.given_up if self._before else ())
        self._told_problem, self._is_slow = "", False
        self._lock = threading.Lock()
        """The thread that saves looks too."""
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes] | None:
        self._start_at = time.monotonic() + _AGAIN_SECONDS
        log = log_file(self._folder.path, self._node)
        try:
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as out:
                process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
        except OSError:
            return None
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)  # one that hangs is waited for by nobody
        return process

    def look(self) -> NodeState | None:
        """How far it is, by its own word of half a second ago; None while it has not said anything."""
        now = time.monotonic()
        with self._lock:
            if now >= self._look_at:
                self._look()
            return self._state

    def _look(self) -> None:
        now = time.monotonic()
        self._look_at = now + _LOOK_SECONDS
        state = read_state(self._folder.path, self._node)
        self._state = state if state is not None and state.launch_id == self._launch_id else None
        is_running = self._process is not None and self._process.poll() is None
        if not is_running and now >= self._start_at:
            self._process = self._start()
        for key in () if self._state is None else self._state.done:
            self._given_up.pop(key, None)
        self._tell_given_up()

    def _tell_given_up(self) -> None:
        """Tell the uploader, at every look until its state says so: it may have died, or be slow to hear."""
        if self._process is None or self._process.stdin is None:
            return
        for one in self._given_up.values():
            with suppress(OSError):
                os.write(self._process.stdin.fileno(), json.dumps(asdict(one)).encode() + b"\n")

    def _done(self) -> set[Checkpoint]:
        """What nothing has to wait for any more, as far as that is known."""
        state = self._state or self._before
        return {*(() if state is None else state.done), *self._given_up}

    def uploading(self, steps: Collection[int]) -> Uploading:
        """For the policy of what is kept on this disk; gives up what is beyond `s3_upload.max_backlog`.

        Args:
            steps: those on this disk that are not damaged, the newest included.
        """
        here = self._identified(steps)
        with self._lock:
            self._look()
            done, sending = self._done(), None if self._state is None else self._state.sending
            excess = beyond_backlog(here, done, sending, self._upload.max_backlog)
            self._given_up |= {(one.step, one.identity): one for one in excess}
            self._tell_given_up()
            return Uploading(self._upload.remove_after_upload, {step for step, _ in here.intersection(self._done())})

    def events(self, save_seconds: float | None) -> list[Event]:
        """What has happened since the last call: `upload` (a step is in the store, or was given up), `slow_upload`,
        `upload_problem` (also when it is over: `reason` is null then).

        Args:
            save_seconds: between the newest two saves; None: there were none.
        """
        state = self.look()
        if state is None:
            return []
        found: list[Event] = []
        with self._lock:
            given_up = {given for given in (*state.given_up, *self._given_up.values()) if given not in self._told}
        waiting = [step for step in state.waiting if step not in {given.step for given in given_up}]
        for one in state.uploaded:
            if one.was_there or one.time < self._began or one in self._told:
                continue
            self._told.add(one)
            found.append(_event(one.step, one.seconds, one.num_bytes, waiting, None))
            is_slow = save_seconds is not None and one.seconds > save_seconds
            if is_slow and not self._is_slow:
                found.append(
                    {
                        "event": "slow_upload",
                        "step": one.step,
                        "upload_seconds": one.seconds,
                        "save_seconds": save_seconds,
                    }
                )
            self._is_slow = is_slow
        for given in sorted(given_up, key=lambda one: one.step):
            self._told.add(given)
            found.append(_event(given.step, None, 0, waiting, f"given up: {given.reason}"))
        if bool(state.problem) != bool(self._told_problem):
            found.append({"event": "upload_problem", "reason": state.problem or None, "waiting": waiting})
        self._told_problem = state.problem
        return found

    def wait(
        self,
        seconds: float,
        is_asked_to_stop: Callable[[], bool],
        tell: Callable[[str], None],
        meanwhile: Callable[[], None],
    ) -> None:
        """Return when everything is in the store, after so many seconds, or when asked to stop.

        Args:
            tell: takes a line now and then.
            meanwhile: called at each look.
        """
        deadline, told = time.monotonic() + seconds, time.monotonic() - _TELL_SECONDS + _FIRST_TELL_SECONDS
        newest = self._identified(self._folder.steps()[-1:])
        while time.monotonic() < deadline and not is_asked_to_stop():
            state = self.look()
            meanwhile()
            if state is not None and not state.waiting and newest.issubset(state.done):
                return
            if state is not None and time.monotonic() - told >= _TELL_SECONDS:
                told = time.monotonic()
                tell(progress_line(state))
            time.sleep(0.1)

    def end(self) -> None:
        """End the process; what is sent half is sent again by the next one."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_ENDS_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process, self._start_at, self._look_at = None, float("inf"), 0.0

    def left(self) -> list[int]:
        """The steps on this disk that are neither in the store nor given up, as far as that is known."""
        self.look()
        return sorted(step for step, _ in self._identified(self._folder.steps()) - self._done())

    def _identified(self, steps: Collection[int]) -> set[Checkpoint]:
        return {(step, local_identity(self._folder.step_folders(step))) for step in steps}


def progress_line(state: NodeState) -> str:
    """What an uploader does, in one line."""
    waiting = f"{len(state.waiting)} step{'s' * (len(state.waiting) != 1)} to upload"
    if state.problem:
        return f"{waiting}; {state.problem}"
    if state.sending is None:
        return waiting
    left = (state.sending_bytes - state.sent_bytes) / max(state.bytes_per_second, 1.0)
    sent = f"step {state.sending}: {state.sent_bytes / 1e9:.2f} of {state.sending_bytes / 1e9:.2f} GB sent"
    return f"{waiting}; {sent}, about {left:,.0f} s left of it" if state.bytes_per_second else f"{waiting}; {sent}"


def start_uploads(folder: RunFolder, recipe: Recipe, disks: "Disks", node: str, launch_id: str) -> Uploads | None:
    """On the first rank of each disk, where the recipe uploads; else None. The checkpoints are held by this launch."""
    upload = recipe.s3_upload
    if upload is None or upload.upload_s3_path is None or not disks.is_leader:
        return None
    names = disks.names if len(disks.names) > 1 else (node,)
    return Uploads(folder, recipe, names[disks.here], names, launch_id)


def _event(step: int, seconds: float | None, num_bytes: int, waiting: list[int], error: str | None) -> Event:
    return {
        "event": "upload",
        "step": step,
        "seconds": seconds,
        "num_bytes": num_bytes,
        "waiting": waiting,
        "error": error,
    }
