"""What the cluster's tests share: one cluster of three nodes, put in order again after each test."""

import os
from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def cluster_machine() -> None:
    """This machine can play a cluster; else the test is skipped, and fails where it must not be missed: in CI."""
    reason = why_not()
    if reason is not None and os.environ.get("CI"):
        pytest.fail(f"no cluster can be played in CI: {reason}")
    if reason is not None:
        pytest.skip(f"no cluster can be played here: {reason}")


@pytest.fixture(scope="session")
def running_cluster(cluster_machine: None) -> Iterator[SlurmCluster]:
    """Three nodes with two GPUs each, which are only scheduled."""
    with SlurmCluster(3, gpus=2) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The session's cluster with every node idle; a test may leave jobs, and nodes that are off or cut off."""
    yield running_cluster
    running_cluster.reset()
