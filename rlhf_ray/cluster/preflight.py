"""What every node that is given work must have: this package, the versions that the driver has, the run's directory."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.errors import UserError
from rlhf_ray.storage import url_of
from rlhf_ray.versions import ON_NODES, TESTED


class _Found(NamedTuple):
    """What a node has. files: of the package, by name, a hash; None if it is not there. versions: of other packages.
    writes: why not, or empty."""

    files: dict[str, str] | None
    versions: dict[str, str]
    sees: bool
    writes: str


def _inspection() -> Callable[[str | None, str | None], tuple[Any, ...]]:
    """A function that looks at the node it runs on, and returns a `_Found` as a plain tuple. It imports nothing heavy.

    Made anew, so that it travels by value: it must not need the package that a node may lack.
    """

    def inspect(mark: str | None, copy: str | None) -> tuple[Any, ...]:
        import hashlib
        import importlib.util
        from pathlib import Path

        package, files = importlib.util.find_spec("rlhf_ray"), None
        if package is not None and package.submodule_search_locations:
            root = Path(package.submodule_search_locations[0])
            files = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
                     for path in root.rglob("*.py")} or None
        if files is None:
            return None, {}, True, ""
        from rlhf_ray import storage, versions

        here = files, versions.installed()
        if copy is not None:
            try:
                storage.probe(Path(copy))
            except Exception as error:
                return *here, True, str(error)
        if mark is None:
            return *here, True, ""
        own = Path(f"{mark}-{ray.get_runtime_context().get_node_id()}")
        try:
            own.write_text("")
            own.unlink()
        except OSError as error:
            return *here, Path(mark).exists(), error.strerror
        return *here, Path(mark).exists(), ""

    return inspect


@functools.cache
def _task() -> Any:
    """Returns the id of its node, too."""
    inspect = _inspection()

    def look(mark: str | None, copy: str | None) -> tuple[str, tuple[Any, ...]]:
        return ray.get_runtime_context().get_node_id(), inspect(mark, copy)

    return ray.remote(num_cpus=0, max_retries=0)(look)


class Visit:
    """A task that looks at the node it is sent to; `close` it.

    where: Ray's scheduling strategy. directory: exists and can be written here; None: is not looked at. If it is the
    copy of a URL, that is written, and the copies are the nodes' own.
    """

    def __init__(self, where: Any, directory: Path | None):
        self._directory = directory
        copy = str(directory) if directory and url_of(directory) else None
        # a new name: NFS remembers what is not there
        self._mark = directory / f".seen-{secrets.token_hex(8)}" if directory and not copy else None
        if self._mark:
            self._mark.write_text("")
        self.answer = _task().options(scheduling_strategy=where).remote(str(self._mark) if self._mark else None, copy)

    def problem(self) -> str:
        """What is wrong with the node, in a line that names it; or empty. Raises RayError if it has not said so."""
        node, found = ray.get(self.answer, timeout=0)
        problem = _problem(_Found(*found), _Found(*_inspection()(None, None)), self._directory)
        return f"{_names().get(node, node)} {problem}" if problem else ""

    def close(self) -> None:
        if self._mark:
            with suppress(OSError):
                self._mark.unlink(missing_ok=True)


def check_nodes(node_ids: Iterable[str], directory: Path | None, timeout_s: float) -> None:
    """Raise UserError, with a line for each node that lacks a package, has another one than this process, does not
    share `directory` or cannot write there, or does not answer in time.

    node_ids: Ray's. directory: see `Visit`.
    """
    visits: dict[str, Visit] = {}
    try:
        for node in set(node_ids):
            visits[node] = Visit(NodeAffinitySchedulingStrategy(node, soft=False), directory)
        ray.wait([visit.answer for visit in visits.values()], num_returns=len(visits), timeout=timeout_s)
        problems = [problem for node, visit in visits.items() if (problem := _heard(node, visit, timeout_s))]
    finally:
        for visit in visits.values():
            visit.close()
    if problems:
        raise UserError("\n".join(problems))


def _heard(node: str, visit: Visit, timeout_s: float) -> str:
    try:
        return visit.problem()
    except ray.exceptions.GetTimeoutError:
        return f"{_names()[node]} did not answer within cluster.start_timeout_s={timeout_s:.0f} s"
    except ray.exceptions.RayError as error:
        return f"{_names()[node]} cannot run a task: {' '.join(str(error).split())[-300:]}"


def _names() -> dict[str, str]:
    return {node["NodeID"]: f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            for node in ray.nodes()}


def _problem(there: _Found, here: _Found, directory: Path | None) -> str:
    if there.files is None:
        return "has no rlhf_ray: install it there, in the environment from which `ray start` is called"
    assert here.files is not None
    other = sorted(name for name in here.files.keys() | there.files if here.files.get(name) != there.files.get(name))
    if other:
        more = f" and {len(other) - 1} more files" if len(other) > 1 else ""
        return f"has another rlhf_ray than the driver ({other[0]}{more}): install the same version everywhere"
    if differ := [text for name in ON_NODES if (text := _difference(name, there.versions, here.versions))]:
        return (f"has other packages than the driver: {', '.join(differ)}; install the same there, in the environment "
                "from which `ray start` is called")
    if not there.sees:
        return f"does not share output_dir: {directory} is not the same directory there; give a path that all nodes see"
    if there.writes and directory and url_of(directory):
        return f"cannot use {there.writes}"
    if there.writes:
        return f"cannot write to output_dir, {directory}: {there.writes}; make it writable for the user that runs Ray"
    return ""


def _difference(name: str, there: dict[str, str], here: dict[str, str]) -> str:
    """Of the versions of a package; builds of one version (`+cpu`) are the same. Empty if there is none."""
    found, wanted = (versions.get(name, "").split("+")[0] for versions in (there, {**TESTED, **here}))
    return "" if found == wanted else f"{name} {found} instead of {wanted}" if found else f"no {name} ({wanted})"
