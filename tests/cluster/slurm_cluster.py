"""A real Slurm on this machine: its daemons, nodes that can be switched off and cut off, and its client commands."""

import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from private_machines import PrivateMachines, poll, start_daemon, stop_daemon
from private_machines import why_not as machines_why_not
from slurm_conf import NODE_PORT, write_configuration

DAEMONS = ("slurmctld", "slurmd", "munged")
START_SECONDS = 30.0
SETTLE_SECONDS = 5.0
"""After a job left COMPLETING: Slurm books the end of its old batch script on a new start that comes sooner."""

ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
"""States of a job that do not change by themselves."""

Job = dict[str, str]
Condition = str | Callable[[Job], bool]


class ClusterError(AssertionError):
    """The cluster did not do what it was asked for; says so with the end of its logs."""


def why_not() -> str | None:
    """What this machine lacks for a cluster, or None."""
    return machines_why_not(DAEMONS)


class SlurmCluster:
    """Nodes `node1` … with 8 CPUs each, partitions `train` (the default) and `urgent`, which preempts it by requeue.

    Files are shared by all nodes and this machine; only `scratch` is another folder on each node (its content, seen
    from here, is `disk(node)`). Nodes find each other by name, and this machine at `own_address`; 127.0.0.1 is the
    node's own, and no other network is reached.

    gpus: a node's, which are scheduled and set CUDA_VISIBLE_DEVICES, but are no devices that compute.
    scratch: path of a node's own disk; default: a path in the cluster's folder.
    settings: lines of slurm.conf that win over the cluster's own.
    """

    def __init__(
        self,
        nodes: int = 3,
        *,
        cpus: int = 8,
        gpus: int = 0,
        scratch: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.names = [f"node{index + 1}" for index in range(nodes)]
        self.folder = Path()
        self.environment: dict[str, str] = {}
        self._wanted = (cpus, gpus, scratch, settings or {})
        self._machines: PrivateMachines | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _start(self) -> None:
        cpus, gpus, scratch, settings = self._wanted
        # munged refuses a socket that others could not reach.
        self.folder.chmod(0o755)
        for name in ("dev", "log", "munge", "spool", "state", "work"):
            (self.folder / name).mkdir(mode=0o755)
        for index in range(gpus):
            os.mknod(self.folder / "dev" / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        self._machines = PrivateMachines(self.folder, self.names, scratch or self.folder / "scratch")
        addresses = self._machines.addresses
        fake_gpus = f"{self.folder}/dev/gpu[0-{gpus - 1}]"
        conf = write_configuration(self.folder, self.own_address, addresses, cpus, gpus, fake_gpus, settings)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = kept | {"SLURM_CONF": str(conf)}
        self._machines.open()
        self._start_munged()
        self._start_daemon("slurmctld", "slurmctld", "-D", "-c", "-f", str(conf))
        for name in self.names:
            self._power_on(name)
        if not poll(lambda: self._check_daemons() and set(self._node_states().values()) == {"idle"}, START_SECONDS):
            raise self._error(f"nodes are not idle after {START_SECONDS:.0f} s: {self._node_states()}")

    def _start_munged(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        options = [f"--{option}-file={munge}/{option}" for option in ("key", "pid", "seed")]
        self._start_daemon("munged", "munged", "--foreground", f"--socket={munge}/socket", *options)
        poll(lambda: (munge / "socket").exists() or not self._check_daemons(), START_SECONDS)

    def _start_daemon(self, name: str, *command: str) -> None:
        self._daemons[name] = start_daemon(command, self.folder / "log" / f"{name}.out", self.environment)

    def _check_daemons(self) -> bool:
        """True; raises where a daemon or a node has ended."""
        ended = [name for name, daemon in {**self._daemons, **self._all.running}.items() if daemon.poll() is not None]
        if ended:
            raise self._error(f"ended: {', '.join(ended)}")
        return True

    def _stop(self) -> None:
        try:
            if self._machines is not None:
                self._machines.close()
        finally:
            for daemon in self._daemons.values():
                stop_daemon(daemon)
            self._daemons.clear()
            shutil.rmtree(self.folder)

    @property
    def _all(self) -> PrivateMachines:
        assert self._machines is not None, "the cluster is not entered"
        return self._machines

    @property
    def own_address(self) -> str:
        """At which nodes reach what listens on this machine."""
        return self._all.own_address

    @property
    def addresses(self) -> dict[str, str]:
        """The nodes' addresses by name, for what runs on this machine: only nodes know the names."""
        return self._all.addresses

    @property
    def scratch(self) -> Path:
        """Path of a node's own disk, on each node."""
        return self._all.scratch

    @property
    def work(self) -> Path:
        """Where client commands run, and so where jobs do and write their output. Shared."""
        return self.folder / "work"

    def disk(self, node: str) -> Path:
        """The content of a node's `scratch`, seen from this machine; it outlasts a power failure."""
        return self.folder / "disks" / node

    def run(self, *command: str | Path, seconds: float = 30.0, stdin: str = "") -> str:
        """The output of a client command, run in `work`; raises ClusterError where it fails or takes longer."""
        try:
            result = subprocess.run(
                command,
                input=stdin,
                env=self.environment,
                cwd=self.work,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise self._error(f"no answer in {seconds:g} s: {' '.join(map(str, command))}") from error
        if result.returncode:
            said = (result.stdout + result.stderr).strip()
            raise self._error(f"exit {result.returncode}: {' '.join(map(str, command))}: {said}")
        return result.stdout

    def submit(self, *arguments: str | Path, script: str = "") -> int:
        """Submit a job with sbatch, its script a file among the arguments or a text; returns its id."""
        return int(self.run("sbatch", "--parsable", *arguments, stdin=script).split(";")[0])

    def job(self, job_id: int) -> Job:
        """What `scontrol show job` says of a job: JobState, Restarts, ExitCode, Reason, NodeList, StdOut …"""
        line = self.run("scontrol", "show", "job", "-o", str(job_id)).strip()
        return dict(field.split("=", 1) for field in re.split(r" (?=[A-Z][A-Za-z:/]*=)", line))

    def output(self, job_id: int) -> str:
        """What a job has written to its output file by now."""
        file = Path(self.job(job_id)["StdOut"])
        return file.read_text() if file.exists() else ""

    def wait(self, job_id: int, until: Condition, seconds: float) -> Job:
        """Wait for a job's state, or a condition on `job(job_id)`; raises once it ends otherwise or time is up."""
        reached: Callable[[Job], bool] = (lambda job: job["JobState"] == until) if isinstance(until, str) else until
        end = time.monotonic() + seconds
        while not reached(job := self.job(job_id)):
            late = time.monotonic() > end
            if late or job["JobState"] in ENDED:
                what = f"did not get there in {seconds:g} s" if late else "ended otherwise"
                wanted = until if isinstance(until, str) else "a condition"
                raise self._error(f"job {job_id} {what} ({wanted}): {job}\n{self.output(job_id)[-2000:]}")
            time.sleep(0.2)
        return job

    def release(self, job_id: int, seconds: float = 90.0) -> None:
        """Wait for a job's requeue, and let it start as soon as it can: Slurm would hold it back for two minutes."""
        self.wait(job_id, lambda job: job["JobState"] == "PENDING" and job["Restarts"] != "0", seconds)
        time.sleep(SETTLE_SECONDS)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def nodes(self) -> dict[str, str]:
        """State by node, as sinfo writes it: idle, allocated, mixed, down* …; a star means that it does not answer."""
        return dict(line.split() for line in self.run("sinfo", "-hNp", "train", "-o", "%N %T").splitlines())

    def reconfigure(self, key: str, value: str) -> None:
        """Give a setting of slurm.conf another value, while the daemons run."""
        file = Path(self.environment["SLURM_CONF"])
        text, count = re.subn(rf"^{key}=.*$", f"{key}={value}", file.read_text(), flags=re.MULTILINE)
        assert count == 1, key
        file.write_text(text)
        self.run("scontrol", "reconfigure")

    def _node_states(self) -> dict[str, str]:
        """As `nodes`; nothing before the controller answers."""
        try:
            return self.nodes()
        except ClusterError:
            return {}

    def wait_node(self, node: str, until: str, seconds: float) -> None:
        """Wait for the state of a node; a star is not looked at. A node that failed is `down` after 30 seconds."""
        if not poll(lambda: self.nodes()[node].rstrip("*") == until, seconds, step=0.2):
            raise self._error(f"{node} is not {until} after {seconds:g} s: {self.nodes()}")

    def processes(self, node: str) -> list[psutil.Process]:
        """Every process that runs on a node, to be killed for example."""
        return self._all.processes(node)

    def power_off(self, node: str) -> None:
        """Take a node's power away: all its processes end at once, and nobody is told."""
        self._all.power_off(node)

    def cut_off(self, node: str) -> None:
        """Pull a node's network cable; its processes run on and can write to shared files."""
        self._all.cut_off(node)

    def reconnect(self, node: str) -> None:
        """Put a node's network cable back; Slurm finds out within 30 seconds, where the node is down."""
        self._all.reconnect(node)

    def start_node(self, node: str, seconds: float = START_SECONDS) -> None:
        """Switch a node on and wait until Slurm uses it again; it may not have noticed that the node was off."""
        self._power_on(node)
        if not poll(lambda: self._is_back(node), seconds, step=0.2):
            raise self._error(f"{node} is not back after {seconds:g} s: {self.nodes()}")

    def _is_back(self, node: str) -> bool:
        return self._check_daemons() and self._answers(node) and self.nodes()[node].isalpha()

    def _are_idle(self) -> bool:
        return all(map(self._answers, self.names)) and set(self.nodes().values()) == {"idle"}

    def _answers(self, node: str) -> bool:
        try:
            socket.create_connection((self.addresses[node], NODE_PORT), timeout=1).close()
        except OSError:
            return False
        return True

    def _power_on(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        command = ["slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"]]
        self._all.power_on(node, command, self.folder / "log" / f"slurmd.{node}.out", self.environment)

    def reset(self, seconds: float = 60.0) -> None:
        """Cancel every job, and bring every node back until it is idle, by switching it off and on where need be."""
        states = self.nodes()
        for node in self.names:
            if node in self._all.running:
                self.reconnect(node)
                if "*" in states[node] or "down" in states[node]:
                    self.power_off(node)
            if node not in self._all.running:
                self._power_on(node)
            if "drain" in states[node]:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.run("scancel", "--user=root")
        if not poll(self._are_idle, seconds, step=0.2):
            raise self._error(f"nodes are not idle after {seconds:g} s: {self.nodes()}")

    def _error(self, message: str) -> ClusterError:
        """What a daemon said on its output is shortened where its log says it too."""
        ends = []
        for log in sorted((self.folder / "log").iterdir()):
            twice = log.suffix == ".out" and log.with_suffix(".log").exists()
            ends.append(f"--- end of {log.name} ---\n{log.read_text(errors='replace')[-200 if twice else -1000 :]}")
        return ClusterError("\n".join([message, *ends]))
