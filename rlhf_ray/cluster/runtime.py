"""Ray: start a private one or join a cluster, and leave nothing behind."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.state import available_resources_per_node
from ray.exceptions import AuthenticationError

from rlhf_ray.cluster.job import told
from rlhf_ray.cluster.role import ROLE_ENV
from rlhf_ray.cluster.zygote import OF, Zygote
from rlhf_ray.config.schema import ClusterConfig, Config
from rlhf_ray.core.packing import NodeResources
from rlhf_ray.errors import UserError
from rlhf_ray.storage import local_root

JUDGE_CPUS = 0.1  # it only watches


def roles_cpus(cfg: Config) -> int:
    """CPU slots that the roles of the hungriest stage ask for, rounded up."""
    r = cfg.roles
    total = (
        r.generator.replicas * r.generator.cpus + len(cfg.reward.sources) * r.reward.replicas * r.reward.cpus
        + r.reference.replicas * r.reference.cpus + r.policy.ranks * r.policy.cpus + r.critic.ranks * r.critic.cpus
        + JUDGE_CPUS
    )
    return math.ceil(max(total, r.supervised.ranks * r.supervised.cpus))


@contextmanager
def session(cfg: Config) -> Iterator[None]:
    """Ray for the duration of a stage; inside another session (a pipeline) that one is used.

    A private Ray ends with the session, and every process of it. In a cluster only our own actors end.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    forks = address_of(cfg.cluster) == "local" and sys.platform == "linux"  # macOS's libraries do not outlive a fork
    with _zygote() if forks else nullcontext():
        at_sigterm = signal.getsignal(signal.SIGTERM)
        _connect(cfg.cluster, cfg)
        if callable(at_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_sigterm)  # ray.init has put one of its own in its place
        try:
            with told(local_root(cfg.output_dir)):
                yield
        finally:
            ray.shutdown()


_zygotes: list[Zygote] = []  # of the session that there is


@contextmanager
def _zygote() -> Iterator[None]:
    _zygotes.append(Zygote(ROLE_ENV))
    try:
        yield
    finally:
        _zygotes.pop().close()


def python_of(module: str) -> str:
    """Ray's `py_executable` for an actor without a GPU whose class is from this module; empty: its own."""
    return _zygotes[-1].command(OF[module]) if _zygotes and module in OF else ""


def address_of(cluster: ClusterConfig) -> str:
    """`local`, or where the cluster is that is joined: in a Ray job by itself the job's."""
    in_job = RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ  # which a job's driver has, and nobody else
    return "auto" if cluster.address == "local" and in_job else cluster.address


def _connect(cluster: ClusterConfig, cfg: Config) -> None:
    address = address_of(cluster)
    if address != "local":
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, AuthenticationError) as error:
            raise UserError(f"cluster.address={address}: no Ray cluster answers there, or it refuses the token "
                            "(~/.ray/auth_token must be that of the cluster's head); start one with `ray start "
                            "--head`, or set cluster.address=local") from error
        except RuntimeError as error:
            if "Version mismatch" not in str(error):
                raise
            raise UserError(f"cluster.address={address}: {' '.join(str(error).split())}; use the same Ray and the "
                            "same Python on both") from error
        return
    ray.init(  # with token authentication, which is Ray's default
        address="local",
        num_cpus=cluster.num_cpus or max(os.cpu_count() or 1, roles_cpus(cfg)),
        object_store_memory=int(cluster.object_store_gib * 2**30),
        include_dashboard=cluster.dashboard,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"prestart_worker_first_driver": False},
    )


def nodes() -> dict[str, NodeResources]:
    """Every living node, by Ray's id, and what it offers in all."""
    return {node["NodeID"]: _offer(node["NodeManagerHostname"], node["Resources"])
            for node in ray.nodes() if node["Alive"]}


def free() -> list[NodeResources]:
    """The same nodes, and what of it nobody has now."""
    left = available_resources_per_node()
    return [_offer(node.name, left.get(node_id, {})) for node_id, node in nodes().items()]


def _offer(name: str, resources: Mapping[str, float]) -> NodeResources:
    return NodeResources(name, float(resources.get("CPU", 0)), float(resources.get("GPU", 0)))


_PORTS = range(20_000, 30_000)  # no system hands these out to whoever asks for any port, nor does Ray to its workers


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now.

    It will be bound seconds later: none of those that others are given by chance meanwhile.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
    raise UserError(f"no TCP port of {_PORTS.start} to {_PORTS.stop - 1} is free on {socket.gethostname()}")
