"""What is said of a node by what it has. What nodes answer on the real Ray: end_to_end/test_submit.py, test_url.py."""

from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray.cluster import preflight as module
from rlhf_ray.cluster.preflight import _Found, _inspection, _problem

DIRECTORY = Path("/shared/run")
HERE = _Found({"cli.py": "a", "errors.py": "b"}, True, "")


def get(answer: Any, timeout: float) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.mark.parametrize(("answer", "says"), [
    (HERE, ""),
    (_Found(None, True, ""), "has no rlhf_ray: install it there"),
    (_Found({"cli.py": "a", "errors.py": "c"}, True, ""),
     "has another rlhf_ray than the driver (errors.py): install the same version everywhere"),
    (_Found({"errors.py": "c", "more.py": "d"}, True, ""), "(cli.py and 2 more files)"),
    (HERE._replace(sees=False), "does not share output_dir: /shared/run is not the same directory there"),
    (HERE._replace(writes="Permission denied"), "cannot write to output_dir, /shared/run: Permission denied; make it"),
    (ray.exceptions.GetTimeoutError(), "did not answer within cluster.start_timeout_s=9 s"),
    (ray.exceptions.RayError("no\n  memory"), "cannot run a task: no memory"),
])
def test_what_is_wrong_is_said_with_what_to_do(answer: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "get", get)
    found = _problem(answer, HERE, DIRECTORY, 9.0)
    assert says in found and bool(says) == bool(found)


def test_a_node_tells_of_every_file_of_the_package() -> None:
    files, sees, writes = _inspection()(None, None)
    assert {"cli.py", "cluster/preflight.py"} <= set(files) and (sees, writes) == (True, "")
    assert not any("test" in name for name in files)
