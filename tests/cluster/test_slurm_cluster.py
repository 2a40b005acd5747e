"""The cluster that other tests run on: what it offers, how its nodes fail, and that it leaves nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from private_machines import LINK_PREFIX, call, poll
from processes import running
from slurm_cluster import ClusterError, SlurmCluster
from slurm_conf import NODE_PORT

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_machine")]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append")

STAYS_THE_FIRST_TIME = """#!/bin/bash
srun --wait=0 bash -c '
    echo "start ${SLURM_RESTART_COUNT:-0} on $(hostname)"
    [ -n "$SLURM_RESTART_COUNT" ] || sleep 600
'
[ -n "$SLURM_RESTART_COUNT" ] || sleep 600
"""

GREET_BY_NAME = """
import os, socket, subprocess, time
names = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True).stdout.split()
listener = socket.create_server(("", 7000))
for name in names:
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection((name, 7000), timeout=5).sendall(socket.gethostname().encode())
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.1)
heard = sorted(listener.accept()[0].recv(100).decode() for _ in names)
print(socket.gethostname(), "heard", *heard)
"""

KILLED = """
import sys, time
from slurm_cluster import SlurmCluster
with SlurmCluster(1) as cluster:
    print(cluster.folder, flush=True)
    time.sleep(600)
"""


def test_three_nodes_are_idle_within_seconds(cluster_machine: None) -> None:
    before = time.monotonic()
    with SlurmCluster(3) as cluster:
        took = time.monotonic() - before
        assert cluster.nodes() == {"node1": "idle", "node2": "idle", "node3": "idle"}
    assert took < 20


def test_a_step_runs_on_every_node(cluster: SlurmCluster) -> None:
    assert sorted(cluster.run("srun", "--nodes=3", "hostname").split()) == cluster.names


def test_nodes_reach_each_other_by_name(cluster: SlurmCluster) -> None:
    said = cluster.run("srun", "--nodes=3", sys.executable, "-c", GREET_BY_NAME, seconds=60)
    assert sorted(said.splitlines()) == [f"{name} heard node1 node2 node3" for name in cluster.names]


def test_each_node_has_a_disk_of_its_own(cluster: SlurmCluster) -> None:
    cluster.run("srun", "--nodes=3", "bash", "-c", f"hostname > {cluster.scratch}/name")
    assert [(cluster.disk(name) / "name").read_text().strip() for name in cluster.names] == cluster.names
    assert list(cluster.scratch.iterdir()) == []
    assert cluster.run("srun", "--nodelist=node2", "cat", cluster.scratch / "name") == "node2\n"


def test_gpus_are_scheduled(cluster: SlurmCluster) -> None:
    show = ("bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert cluster.run("srun", "--nodes=2", "--gres=gpu:2", *show).split() == ["0,1", "0,1"]
    with pytest.raises(ClusterError, match="exit 1: srun"):
        cluster.run("srun", "--nodes=1", "--gres=gpu:3", *show)


def test_a_job_that_ends_otherwise_is_reported_at_once(cluster: SlurmCluster) -> None:
    job_id = cluster.submit(script="#!/bin/bash\necho the reason\nexit 3\n")
    with pytest.raises(ClusterError, match=r"ended otherwise \(COMPLETED\)(.|\n)*the reason"):
        cluster.wait(job_id, "COMPLETED", 30)
    assert cluster.job(job_id)["ExitCode"] == "3:0"


def test_a_node_that_is_drained_or_set_down_is_put_in_order(cluster: SlurmCluster) -> None:
    cluster.run("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    assert cluster.nodes() == {"node1": "drained", "node2": "down", "node3": "idle"}
    cluster.reset()
    assert set(cluster.nodes().values()) == {"idle"}


def test_an_urgent_job_takes_the_nodes_of_a_job_that_is_requeued(cluster: SlurmCluster) -> None:
    job_id = cluster.submit("--exclusive", *TWO_NODES, script=STAYS_THE_FIRST_TIME)
    cluster.wait(job_id, "RUNNING", 20)
    urgent = cluster.submit("--exclusive", "--partition=urgent", "--nodes=3", script="#!/bin/bash\ntrue\n")
    cluster.wait(urgent, "COMPLETED", 60)
    cluster.release(job_id)
    cluster.wait(job_id, "COMPLETED", 30)


def test_a_job_whose_node_loses_power_runs_on_the_others(cluster: SlurmCluster) -> None:
    job_id = cluster.submit(*TWO_NODES, script=STAYS_THE_FIRST_TIME)
    assert poll(lambda: cluster.output(job_id).count("start 0") == 2, 20)
    cluster.power_off("node2")
    cluster.release(job_id)
    assert cluster.wait(job_id, "COMPLETED", 30)["NodeList"] == "node[1,3]"
    lines = sorted(cluster.output(job_id).splitlines())
    assert [line for line in lines if line.startswith("start 1")] == ["start 1 on node1", "start 1 on node3"]
    assert cluster.nodes() == {"node1": "idle", "node2": "down*", "node3": "idle"}
    cluster.start_node("node2")
    assert cluster.run("srun", "--nodes=3", "hostname").count("node2") == 1


def test_a_job_whose_first_node_is_cut_off_runs_on_the_others(cluster: SlurmCluster) -> None:
    job_id = cluster.submit(*TWO_NODES, script=STAYS_THE_FIRST_TIME)
    assert poll(lambda: cluster.output(job_id).count("start 0") == 2, 20)
    assert cluster.job(job_id)["BatchHost"] == "node1"
    cluster.cut_off("node1")
    cluster.release(job_id)
    assert cluster.wait(job_id, "COMPLETED", 30)["NodeList"] == "node[2-3]"
    assert running(cluster.processes("node1"), "sleep"), "a node that is cut off runs on"


def test_a_node_that_is_cut_off_is_not_reached_until_it_is_reconnected(cluster: SlurmCluster) -> None:
    def reached(name: str) -> bool:
        try:
            socket.create_connection((cluster.addresses[name], NODE_PORT), timeout=1).close()
        except OSError:
            return False
        return True

    cluster.cut_off("node3")
    assert [reached(name) for name in cluster.names] == [True, True, False]
    assert running(cluster.processes("node3"), "slurmd")
    cluster.reconnect("node3")
    assert poll(lambda: reached("node3"), 10)


CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
"""


def test_a_node_that_was_switched_off_and_on_is_reached_by_the_others_at_once(cluster: SlurmCluster) -> None:
    connect = [sys.executable, "-c", CONNECT, cluster.addresses["node2"], str(NODE_PORT)]
    cluster.run("srun", "--nodelist=node1", *connect)
    cluster.power_off("node2")
    cluster.start_node("node2")
    cluster.run("srun", "--nodelist=node1", *connect)


def machine_state() -> list[str]:
    """Links, namespaces, mounts and names of this machine, but for what others' tests make and remove meanwhile."""
    links = call(["ip", "-oneline", "link"]).splitlines()
    state = [line for line in links if f" {LINK_PREFIX}" not in line]
    mounts = Path("/proc/mounts").read_text().splitlines()
    state += [line for line in mounts if not line.split()[1].startswith(tempfile.gettempdir())]
    return [*state, call(["ip", "netns", "list"]), Path("/etc/hosts").read_text()]


def traces(folder: Path, link: str) -> list[str]:
    """What is left of a cluster outside its folder."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    links = [line for line in call(["ip", "-oneline", "link"]).splitlines() if link in line]
    return mounts + links + own_processes(folder)


def own_processes(folder: Path) -> list[str]:
    """Processes with the folder in their command or environment, zombies aside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(f"{process.name}: {words[:100]!r}")
    return found


def own_link(folder: Path) -> str:
    """The link of a cluster that runs, by the address in its configuration."""
    address = next(line for line in (folder / "hosts").read_text().splitlines() if "localhost" not in line).split()[0]
    return next(line for line in call(["ip", "-oneline", "address"]).splitlines() if f" {address}/" in line).split()[1]


def test_a_cluster_beside_another_leaves_nothing(cluster: SlurmCluster) -> None:
    before = machine_state()
    with pytest.raises(KeyboardInterrupt), SlurmCluster(2) as second:
        link = own_link(second.folder)
        assert traces(second.folder, link) != []
        second.submit("--nodes=2", script="#!/bin/bash\nsrun sleep 600\n")
        second.cut_off("node2")
        second.power_off("node1")
        raise KeyboardInterrupt
    assert traces(second.folder, link) == []
    assert not second.folder.exists()
    assert machine_state() == before
    assert set(cluster.nodes().values()) == {"idle"}


def test_a_cluster_that_does_not_start_says_why_and_leaves_nothing(cluster_machine: None) -> None:
    before = machine_state()
    cluster = SlurmCluster(1, settings={"NoSuchKey": "1"})
    with pytest.raises(ClusterError, match="NoSuchKey"):
        cluster.__enter__()
    assert not cluster.folder.exists()
    assert own_processes(cluster.folder) == []
    assert machine_state() == before


def test_a_test_run_that_is_killed_leaves_no_process_and_no_link(cluster_machine: None) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        link = own_link(folder)
        assert traces(folder, link) != []
        process.send_signal(signal.SIGKILL)
    gone = poll(lambda: traces(folder, link) == [], 20)
    shutil.rmtree(folder)
    assert gone, traces(folder, link)


def test_a_path_for_the_nodes_disks_is_made_and_removed(cluster_machine: None, tmp_path: Path) -> None:
    path = tmp_path / "scratch_nvme"
    with SlurmCluster(1, scratch=path) as cluster:
        cluster.run("srun", "bash", "-c", f"hostname > {path}/name")
        assert (cluster.disk("node1") / "name").read_text() == "node1\n"
    assert not path.exists()
