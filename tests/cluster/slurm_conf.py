"""The configuration of a Slurm for tests: failures are found in seconds, and more is offered than the machine has."""

import random
import socket
from collections.abc import Mapping
from pathlib import Path

SETTINGS = {
    "ClusterName": "tests",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "SlurmctldDebug": "verbose",
    "SlurmdDebug": "verbose",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "MpiDefault": "none",
    "SwitchType": "switch/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "SlurmdParameters": "config_overrides",
    "SlurmctldParameters": "preempt_send_user_signal",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_CPU",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "batch_sched_delay=0,sched_interval=5,sched_min_interval=0,bf_interval=1",
    "SlurmctldTimeout": "30",
    "SlurmdTimeout": "10",
    "KillWait": "3",
    "InactiveLimit": "0",
    "WaitTime": "5",
    "MessageTimeout": "10",
    "TCPTimeout": "2",
    "UnkillableStepTimeout": "30",
    "BatchStartTimeout": "10",
    "CompleteWait": "0",
    "MinJobAge": "3600",
    "ReturnToService": "2",
    "JobRequeue": "1",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "PropagateResourceLimitsExcept": "MEMLOCK,NOFILE,CORE",
}
"""Nobody else's daemons are asked, nothing is accounted, no cgroup is made."""

TRAIN = "PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=5"
URGENT = "PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF"

NODE_PORT = 17010
"""Of every slurmd, on an address of its own."""


def write_configuration(
    folder: Path,
    own_address: str,
    nodes: Mapping[str, str],
    cpus: int,
    gpus: int,
    fake_gpus: str,
    settings: Mapping[str, str],
) -> Path:
    """Write slurm.conf and what belongs beside it.

    nodes: address by name. fake_gpus: the devices of one node, as Slurm writes a range. settings: these win over ours.
    """
    paths = {
        "AuthInfo": f"socket={folder}/munge/socket",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
    }
    controller = {
        "SlurmctldHost": f"{socket.gethostname().split('.')[0]}({own_address})",
        "SlurmctldPort": str(free_port()),
    }
    values = SETTINGS | paths | controller | ({"GresTypes": "gpu"} if gpus else {}) | dict(settings)
    lines = [f"{key}={value}" for key, value in values.items()]
    resources = f"CPUs={cpus} RealMemory=64000" + (f" Gres=gpu:{gpus}" if gpus else "")
    lines += [
        f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={NODE_PORT} {resources} State=UNKNOWN"
        for name, address in nodes.items()
    ]
    (folder / "conf").mkdir()
    file = folder / "conf" / "slurm.conf"
    file.write_text("\n".join([*lines, TRAIN, URGENT, ""]))
    gres = f"NodeName={','.join(nodes)} Name=gpu File={fake_gpus}\n" if gpus else ""
    (folder / "conf" / "gres.conf").write_text(gres)
    # Slurm looks at /sys/fs/cgroup even though nothing here uses it, and with this plugin it asks for nothing there.
    (folder / "conf" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "conf" / "plugstack.conf").write_text("")
    return file


def free_port() -> int:
    """A port that nobody listens on, below those which the kernel hands out by itself."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 20000 and 32000")
