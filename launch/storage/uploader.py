"""The uploader of a node: `python -m launch.storage.uploader RECIPE --node NAME …`, started by the first rank of each
disk and outside every collective: nothing in the training ever waits for it.

It looks at the disk by itself, sends the oldest checkpoint that waits, and says how far it is in `uploads/<node>.json`.
What the launch gives up it is told by a line on stdin each. It ends when the process that started it does, at once; the
next one goes on where it was. It deletes nothing.
"""

import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.transfer import Stopped, Watch
from launch.storage.backlog import waiting_of
from launch.storage.remote import own
from launch.storage.state import (
    Checkpoint,
    GivenUp,
    NodeState,
    Uploaded,
    given_up_of,
    joint_state,
    read_state,
    write_state,
)
from launch.storage.store import ENDLESS, DamagedFile, RunStore, Sending, StoreFailed
from launch.storage.task import LocalCheckpoint, UploadTask
from launch.storage.throttle import Throttle
from launch.storage.trouble import Trouble
from launch.train.arguments import Parser
from launch.train.run_folder import RunFolder
from launch.train.streams import describe, say
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe

LOOK_SECONDS = 0.5
HEARTBEAT_SECONDS = 10.0
OTHERS_SECONDS = 2.0
"""Between two looks at what other nodes have sent, and two attempts at a checkpoint that a disk does not give."""
_REMEMBERED = 50
_NICENESS = 10
_END_SECONDS = 2.0
"""For a request that is going on when the process is to end."""


class Uploader:
    """Uploads what appears in a folder of checkpoints until it is told to stop."""

    def __init__(self, folder: RunFolder, recipe: Recipe, node: str, nodes: tuple[str, ...], launch_id: str) -> None:
        upload = recipe.s3_upload
        assert upload is not None
        self._folder, self._upload = folder, upload
        self._nodes = nodes
        place = RunStore(upload, folder.name).place
        before = read_state(folder.path, node)
        known = before.uploaded if before is not None and before.place == place else ()
        self._given_up = given_up_of([before] if before else [])
        self._state = NodeState(node, launch_id, place, time.time(), known, tuple(self._given_up.values()))
        self._said: NodeState | None = None
        self._lock = threading.RLock()
        """Around what the thread that sends and the one that looks both change."""
        self._here: dict[Checkpoint, LocalCheckpoint] = {}
        self._stop, self._wake = threading.Event(), threading.Event()
        """Ends everything; has it look at once."""
        self._of_store = Trouble("the store answers again")
        self._of_sending = Trouble("uploads go on")
        self._of_looking = Trouble("the run's folder can be used again")
        self._sent_bytes = self._sending_bytes = 0
        rate = upload.max_megabytes_per_second
        throttle = None if rate is None else Throttle(rate * 1e6)
        sending = Sending(Watch(self._advance, self._of_store.note, self._stop), self._of_store.well, throttle)
        self._store = RunStore(upload, folder.name, patience=ENDLESS, sending=sending)
        self._sending: Checkpoint | None = None
        self._began = 0.0
        self._thread: threading.Thread | None = None
        self._sent_from_here: set[Checkpoint] = set()
        """Those that wait for the parts of other nodes."""
        self._not_before: dict[Checkpoint, float] = {}
        """When to go on with what waits for others, or could not be sent."""
        self._seconds: dict[Checkpoint, float] = {}
        self._bytes: dict[Checkpoint, int] = {}
        self._is_owned = False
        self._look_at_others = self._written = 0.0

    def run(self) -> None:
        """Return when `stop` is called."""
        while not self._stop.is_set():
            try:
                self.look()
                self._of_looking.well()
            except (OSError, UserError) as error:  # of the run's folder: it will be there again
                self._of_looking.note(describe(error))
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
        if self._thread is not None:
            self._thread.join()
        self._write(is_due=True)

    def stop(self) -> None:
        """Have `run` end; what was sent stays."""
        self._stop.set()
        self._wake.set()

    def look(self) -> None:
        """See what is here, and have the next one sent."""
        here = self._here = self._checkpoints()
        if len(self._nodes) > 1:
            self._give_up_what_others_did(here)
        if self._sending is None:
            self._begin_next([here[key] for key in waiting_of(here, self._done())])
        with self._lock:
            waiting = {step for step, _ in waiting_of(here, self._done())}
            self._state = replace(self._state, waiting=tuple(sorted(waiting)))
        if not waiting:
            self._of_sending.well()
        self._write(is_due=False)

    def give_up(self, one: GivenUp) -> None:
        """Send a checkpoint no more, unless that is being done; said once. Any thread may call this."""
        key = one.step, one.identity
        with self._lock:
            if key in self._given_up or key in {(sent.step, sent.identity) for sent in self._state.uploaded}:
                return
            self._given_up[key] = one
            ascending = sorted(self._given_up.values(), key=lambda given: given.step)
            newest = ascending[-_REMEMBERED:]
            kept = [given for given in ascending if given in newest or (given.step, given.identity) in self._here]
            self._state = replace(self._state, given_up=tuple(kept))
        say(f"step {one.step}: given up: {one.reason}")
        self._wake.set()

    def _checkpoints(self) -> dict[Checkpoint, LocalCheckpoint]:
        """What is here; a manifest is read again only where it is another file than before."""
        found, known = {}, {one.step: one for one in self._here.values()}
        for step in self._folder.steps():
            folders = self._folder.step_folders(step)
            try:
                one = known.get(step)
                if one is None or one.version != LocalCheckpoint.version_of(folders):
                    one = LocalCheckpoint.read(step, folders)
            except (OSError, UserError):  # damaged, or deleted meanwhile
                continue
            if one.manifest.step == step:
                found[step, one.identity] = one
        return found

    def _done(self) -> set[Checkpoint]:
        return {*((one.step, one.identity) for one in self._state.uploaded), *self._given_up}

    def _begin_next(self, waiting: Sequence[LocalCheckpoint]) -> None:
        now = time.monotonic()
        ready = [one for one in waiting if self._not_before.get((one.step, one.identity), 0.0) <= now]
        if not ready:
            return
        one = ready[0]
        self._sending = one.step, one.identity
        self._thread = threading.Thread(target=self._send_and_tell, args=(one,), name="send", daemon=True)
        self._thread.start()

    def _send_and_tell(self, one: LocalCheckpoint) -> None:
        try:
            self._send(one)
        finally:
            self._sending = None
            self._wake.set()

    def _send(self, one: LocalCheckpoint) -> None:
        key = one.step, one.identity
        task = UploadTask(self._store, one, self._state.node, self._nodes, self._upload.workers)
        is_again, was_there = key in self._sent_from_here, False
        began = time.monotonic()
        with self._lock:
            self._sent_bytes, self._sending_bytes, self._began = 0, task.num_bytes(), began
        try:
            if not self._is_owned:
                own(self._store, self._folder)
                self._is_owned = True
            was_there = not is_again and task.is_whole()
            is_whole = was_there or (task.finish() if is_again else task.send())
        except Stopped:
            return
        except DamagedFile as error:
            if not self._is_gone(one):
                self.give_up(GivenUp(*key, describe(error)))
            return
        except Exception as error:  # whatever it is, this goes on and says so
            if not self._is_gone(one):
                is_known = isinstance(error, OSError | UserError | StoreFailed)
                self._of_sending.note(describe(error) if is_known else f"{type(error).__name__}: {describe(error)}")
                self._not_before[key] = time.monotonic() + OTHERS_SECONDS
            return
        finally:
            self._seconds[key] = self._seconds.get(key, 0.0) + time.monotonic() - began
            self._bytes[key] = self._bytes.get(key, 0) + self._sent_bytes
        self._of_sending.well()
        if is_whole:
            self._uploaded(one, was_there)
        else:
            self._sent_from_here.add(key)
            self._not_before[key] = time.monotonic() + OTHERS_SECONDS

    def _uploaded(self, one: LocalCheckpoint, was_there: bool) -> None:
        key = one.step, one.identity
        seconds, number = self._seconds.pop(key), self._bytes.pop(key)
        made = Uploaded(one.step, one.identity, seconds, number, time.time(), was_there)
        with self._lock:
            found = sorted((*self._state.uploaded, made), key=lambda other: other.step)
            newest = {other.step for other in found[-_REMEMBERED:]}
            kept = [other for other in found if other.step in newest or (other.step, other.identity) in self._here]
            self._state = replace(self._state, uploaded=tuple(kept))
        self._sent_from_here.discard(key)
        self._not_before.pop(key, None)
        say(f"step {one.step}: {'was' if was_there else 'is'} in the store, read back ({number / 1e6:,.1f} MB sent)")

    def _give_up_what_others_did(self, here: dict[Checkpoint, LocalCheckpoint]) -> None:
        """Without the parts of another node the rest is of no use."""
        if time.monotonic() < self._look_at_others:
            return
        self._look_at_others = time.monotonic() + OTHERS_SECONDS
        joint = joint_state(self._folder.path)
        for key, one in given_up_of(joint.nodes if joint else ()).items():
            if key in here and key not in self._given_up:
                self.give_up(one)

    def _is_gone(self, one: LocalCheckpoint) -> bool:
        """Whether the checkpoint was deleted, or replaced, while it was sent."""
        try:
            return LocalCheckpoint.read(one.step, one.folders).identity != one.identity
        except (OSError, UserError):
            return True

    def _advance(self, count: int) -> None:
        with self._lock:
            self._sent_bytes += count

    def _write(self, *, is_due: bool) -> None:
        """Say how far it is, where that is another thing than before."""
        with self._lock:
            state, sending, sent = self._state, self._sending, self._sent_bytes
            seconds = max(time.monotonic() - self._began, 1e-9)
        troubles = self._of_store, self._of_sending, self._of_looking
        state = replace(
            state,
            sending=None if sending is None else sending[0],
            sent_bytes=sent if sending else 0,
            sending_bytes=self._sending_bytes if sending else 0,
            bytes_per_second=sent / seconds if sending else 0.0,
            problem=next(filter(None, [one.told() for one in troubles]), ""),
        )
        lasting = replace(state, sent_bytes=0, bytes_per_second=0.0, time=0.0)
        if is_due or lasting != self._said or time.monotonic() - self._written > HEARTBEAT_SECONDS:
            write_state(self._folder.path, replace(state, time=time.time()))
            self._said, self._written = lasting, time.monotonic()


def main(words: Sequence[str]) -> int:
    """Upload until stdin, which is the process that started this one, ends."""
    arguments = _parse(words)
    os.nice(_NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a signal to all of a job; the ranks know what to do with it
    recipe = load_recipe(str(arguments.recipe)).recipe
    run = arguments.recipe.parent
    folder = RunFolder.of(run.parent, run.name, recipe, arguments.node)
    nodes = tuple(arguments.nodes.split(","))
    uploader = Uploader(folder, recipe, arguments.node, nodes, arguments.launch_id)
    threading.Thread(target=_listen, args=(uploader,), daemon=True).start()
    uploader.run()
    return 0


def _listen(uploader: Uploader) -> None:
    for line in sys.stdin.buffer:
        uploader.give_up(GivenUp(**json.loads(line)))
    uploader.stop()
    time.sleep(_END_SECONDS)
    os._exit(0)  # a request that hangs: what it sent is as if it had not been


def _parse(words: Sequence[str]) -> Namespace:
    parser = Parser(prog="launch.storage.uploader", description="Upload the checkpoints of a node.")
    parser.add_argument("recipe", type=Path, help="runs/<name>/recipe.yaml")
    parser.add_argument("--node", required=True)
    parser.add_argument("--nodes", required=True, help="names of the nodes with disks, separated by commas")
    parser.add_argument("--launch-id", required=True)
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
