"""Which Ray a run uses, what is said when it cannot be joined, and ports. Nothing is started."""

import socket

import pytest
import ray

from rlhf_ray.cluster import runtime
from rlhf_ray.cluster.runtime import address_of, free_port, session
from rlhf_ray.config.schema import ClusterConfig, Config
from rlhf_ray.errors import UserError


def test_a_job_uses_its_cluster_unless_it_is_told_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private Ray inside of a cluster would take what the cluster has given to others."""
    assert address_of(ClusterConfig()) == "local"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert address_of(ClusterConfig()) == "auto"
    assert address_of(ClusterConfig(address="10.0.0.1:6379")) == "10.0.0.1:6379"


@pytest.mark.parametrize(("error", "says"), [
    (ConnectionError("Failed to connect"), "no Ray cluster answers there, or it refuses the token"),
    (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.3\n    Python: 3.11.7\n"),
     "Ray: 2.9.3 Python: 3.11.7; use the same Ray and the same Python on both"),
])
def test_a_cluster_that_cannot_be_joined(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    cfg = Config(cluster=ClusterConfig(address="10.0.0.1:6379"))
    with pytest.raises(UserError) as refused, session(cfg):
        pass
    assert str(refused.value).startswith("cluster.address=10.0.0.1:6379: ") and says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_free_port_is_one_that_no_system_hands_out_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bound seconds after it was found."""
    with socket.socket() as taken:
        taken.bind(("", free_port()))
        port = taken.getsockname()[1]
        assert 20_000 <= port < 30_000  # Linux's own begin at 32768, the workers of Ray's end at 19999
        monkeypatch.setattr(runtime, "_PORTS", range(port, port + 1))
        with pytest.raises(UserError, match=f"no TCP port of {port} to {port} is free"):
            free_port()
