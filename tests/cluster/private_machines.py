"""Machines on one machine: processes with a network, a name, a process table and mounts of their own, on one switch.

They hang on processes that the kernel kills together with the one that started them, and no namespace has a name, so
that nothing is left when the tests end, however they end (`ip netns add` would leave a mount at /run/netns).
"""

import ipaddress
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

LINK_PREFIX = "nrc"
"""How the one link begins that a network has on the machine itself."""

SUBNETS = ipaddress.ip_network("198.18.0.0/15")
"""For tests of networks (RFC 2544): no real network is shadowed."""

TOOLS = ("ip", "mount", "hostname", "unshare", "nsenter", "setpriv", "bash")
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21

# Of the machine's process table still: the switch is known by its process.
CONNECT = """
set -eu
name=$1 address=$2 card=$3 switch=$4; shift 4
ip link add eth0 address "$card" type veth peer name "$name" netns "$switch"
nsenter --target "$switch" --net ip link set "$name" master switch up
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up
exec unshare --mount --uts --pid --fork --kill-child --mount-proc bash -c "$@"
"""

# A resolver that cannot be reached costs ten seconds a name. Process ids are the same on several machines, and so names
# in /dev/shm would be. The shell stays, as the first process of the machine, and reaps.
BOOT = """
set -eu
name=$1 folder=$2 scratch=$3; shift 3
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
[ ! -e /etc/resolv.conf ] || mount --bind "$folder/resolv.conf" /etc/resolv.conf
mount --bind "$folder/disks/$name" "$scratch"
mount -t tmpfs tmpfs /dev/shm
"$@"
exit
"""


def why_not(tools: Sequence[str] = ()) -> str | None:
    """What this machine lacks to play several, or None."""
    missing = [tool for tool in (*TOOLS, *tools) if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    status = Path("/proc/self/status").read_text()
    capabilities = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    if os.geteuid() != 0 or not all(capabilities >> bit & 1 for bit in (CAP_NET_ADMIN, CAP_SYS_ADMIN)):
        return "namespaces and network links need root with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    return None


def poll(reached: Callable[[], bool], seconds: float, step: float = 0.05) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(step)
    return True


def start_daemon(command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in the foreground that Ctrl-C does not reach and that does not outlive this one."""
    with log.open("ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def stop_daemon(daemon: subprocess.Popen[bytes]) -> None:
    """End a process, which is given some seconds to end its own, and wait for that."""
    daemon.terminate()
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(5)


class PrivateMachines:
    """A switch, this machine on it with the first address, and machines that are started and switched off by name.

    folder: where the hosts file, logs and the machines' disks are kept.
    scratch: the path at which each machine sees a disk of its own; made here, and removed, where it is missing.
    """

    def __init__(self, folder: Path, names: Sequence[str], scratch: Path) -> None:
        self.folder = folder
        self.scratch = scratch
        self.subnet = free_subnet()
        self.link = LINK_PREFIX + secrets.token_hex(4)
        hosts = list(self.subnet.hosts())
        self.own_address = str(hosts[0])
        self.addresses = {name: str(address) for name, address in zip(names, hosts[10:], strict=False)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        self._made_scratch = False

    def open(self) -> None:
        """Write the files that machines share, and start the switch."""
        for name in self.addresses:
            (self.folder / "disks" / name).mkdir(parents=True)
        lines = {"localhost": "127.0.0.1", socket.gethostname(): self.own_address} | self.addresses
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in lines.items()))
        (self.folder / "resolv.conf").write_text("")
        self._made_scratch = not self.scratch.exists()
        self.scratch.mkdir(exist_ok=True)
        command = ["unshare", "--net", "sleep", "infinity"]
        self._switch = start_daemon(command, self.folder / "switch.log", os.environ)
        namespace = Path(f"/proc/{self._switch.pid}/ns/net")
        ours = os.readlink("/proc/self/ns/net")
        if not poll(lambda: os.readlink(namespace) != ours, 10):
            raise RuntimeError("the switch did not start")
        self._on_switch("add", "switch", "type", "bridge")
        self._on_switch("set", "switch", "up")
        ip("link", "add", self.link, "type", "veth", "peer", "name", "uplink", "netns", str(self._switch.pid))
        self._on_switch("set", "uplink", "master", "switch", "up")
        ip("address", "add", f"{self.own_address}/{self.subnet.prefixlen}", "dev", self.link)
        ip("link", "set", self.link, "up")

    def close(self) -> None:
        """Switch everything off; safe after an `open` that failed, too."""
        for name in list(self.running):
            self.power_off(name)
        if self._switch is not None:
            ip("link", "delete", self.link, check=False)
            stop_daemon(self._switch)
            self._switch = None
        if self._made_scratch:
            self.scratch.rmdir()
            self._made_scratch = False

    def power_on(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Start a machine that runs one command, and is off when that ends. Its disk is as it was left."""
        assert self._switch is not None and name not in self.running
        address = f"{self.addresses[name]}/{self.subnet.prefixlen}"
        # A machine keeps its network card: others send to the card that they know for half a minute and longer.
        card = "02:00:" + ipaddress.ip_address(self.addresses[name]).packed.hex(":")
        boot = [BOOT, "boot", name, str(self.folder), str(self.scratch), *command]
        connect = ["bash", "-c", CONNECT, "connect", name, address, card, str(self._switch.pid), *boot]
        self.running[name] = start_daemon(["unshare", "--net", *connect], log, environment)

    def power_off(self, name: str) -> None:
        """Take a machine's power away: every process of it ends at once."""
        machine = self.running.pop(name)
        # The death of a process table's first process is over when that of all its others is.
        for first in psutil.Process(machine.pid).children() if machine.poll() is None else []:
            first.kill()
        try:
            machine.wait(10)
        finally:
            machine.kill()
        # The kernel drops the link with the machine's network, but later.
        self._on_switch("delete", name, check=False)

    def processes(self, name: str) -> list[psutil.Process]:
        """Every process that runs on a machine."""
        return psutil.Process(self.running[name].pid).children(recursive=True)

    def cut_off(self, name: str) -> None:
        """Pull a machine's network cable; it runs on."""
        self._on_switch("set", name, "down")

    def reconnect(self, name: str) -> None:
        """Put the cable back."""
        self._on_switch("set", name, "up")

    def _on_switch(self, *arguments: str, check: bool = True) -> None:
        assert self._switch is not None
        call(["nsenter", "--target", str(self._switch.pid), "--net", "ip", "link", *arguments], check)


def free_subnet() -> ipaddress.IPv4Network:
    """A /24 that no route of this machine leads into."""
    routes = json.loads(call(["ip", "-json", "-4", "route", "show", "table", "all"]))
    taken = [ipaddress.ip_network(route["dst"]) for route in routes if route["dst"] != "default"]
    subnets: list[Any] = list(SUBNETS.subnets(new_prefix=24))
    free = [subnet for subnet in subnets if not any(subnet.overlaps(network) for network in taken)]
    return random.SystemRandom().choice(free)


def ip(*arguments: str, check: bool = True) -> None:
    """Change the network of this machine."""
    call(["ip", *arguments], check)


def call(command: Sequence[str], check: bool = True) -> str:
    """The output of a command that answers at once; its complaint is the error's text."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if check and result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
