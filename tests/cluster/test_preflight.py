"""What is said of a node by what it has. What nodes answer on the real Ray: end_to_end/test_submit.py, test_url.py."""

from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray.cluster import preflight as module
from rlhf_ray.cluster.preflight import Visit, _Found, _heard, _inspection, _problem
from rlhf_ray.versions import installed

DIRECTORY = Path("/shared/run")
VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm": "0.32.0", "deepspeed": "0.19.8"}
HERE = _Found({"cli.py": "a", "errors.py": "b"}, VERSIONS, True, "")


@pytest.mark.parametrize(("there", "says"), [
    (HERE, ""),
    (HERE._replace(files=None, versions={}), "has no rlhf_ray: install it there"),
    (HERE._replace(files={"cli.py": "a", "errors.py": "c"}),
     "has another rlhf_ray than the driver (errors.py): install the same version everywhere"),
    (HERE._replace(files={"errors.py": "c", "more.py": "d"}), "(cli.py and 2 more files)"),
    (HERE._replace(versions=VERSIONS | {"torch": "2.13.0+cu130"}), ""),  # another build of one version
    (HERE._replace(versions={"torch": "2.12.1+cpu", "transformers": "5.19.0", "vllm": "0.32.0"}),
     "has other packages than the driver: torch 2.12.1 instead of 2.13.0, no deepspeed (0.19.8); install the same "
     "there, in the environment from which `ray start` is called"),
    (HERE._replace(versions=VERSIONS | {"datasets": "1.0"}), ""),  # no actor needs it
    (HERE._replace(sees=False), "does not share output_dir: /shared/run is not the same directory there"),
    (HERE._replace(writes="Permission denied"), "cannot write to output_dir, /shared/run: Permission denied; make it"),
])
def test_what_is_wrong_is_said_with_what_to_do(there: _Found, says: str) -> None:
    found = _problem(there, HERE, DIRECTORY)
    assert says in found and bool(says) == bool(found)


def test_a_driver_that_lacks_a_package_wants_the_tested_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without roles may do without vLLM."""
    monkeypatch.setattr(module, "TESTED", {"vllm": "0.32.0"})
    light = HERE._replace(versions={k: v for k, v in VERSIONS.items() if k != "vllm"})
    assert _problem(HERE, light, DIRECTORY) == ""
    assert "packages than the driver: no vllm (0.32.0);" in _problem(light, light, DIRECTORY)


@pytest.fixture
def visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Visit:
    """Of a node whose answer a test puts into `answer`."""
    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    class Task:
        def options(self, scheduling_strategy: Any) -> "Task":
            return self

        def remote(self, mark: str, copy: str | None) -> None:
            assert Path(mark).is_file() and copy is None

    monkeypatch.setattr(module, "_task", Task)
    monkeypatch.setattr(module.ray, "get", get)
    monkeypatch.setattr(module.ray, "nodes", lambda: [
        {"NodeID": "1", "NodeManagerHostname": "beta", "NodeManagerAddress": "10.0.0.2"}])
    return Visit("there", tmp_path)


def test_a_visit_names_the_node_that_it_led_to(visit: Visit, tmp_path: Path) -> None:
    visit.answer = "1", _inspection()(None, None)
    assert visit.problem() == ""
    visit.answer = "1", (None, {}, True, "")
    assert visit.problem().startswith("node beta (10.0.0.2) has no rlhf_ray: ")
    visit.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("answer", "says"), [
    (ray.exceptions.GetTimeoutError(), "node beta (10.0.0.2) did not answer within cluster.start_timeout_s=9 s"),
    (ray.exceptions.RayError("no\n  memory"), "node beta (10.0.0.2) cannot run a task: no memory"),
])
def test_a_node_that_does_not_answer(answer: Exception, says: str, visit: Visit) -> None:
    visit.answer = answer
    assert _heard("1", visit, 9.0) == says


def test_a_node_tells_of_every_file_of_the_package_and_of_other_packages() -> None:
    files, versions, sees, writes = _inspection()(None, None)
    assert {"cli.py", "cluster/preflight.py"} <= set(files) and (sees, writes) == (True, "")
    assert not any("test" in name for name in files)
    assert versions == installed()
