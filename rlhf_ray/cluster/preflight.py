"""What every node that is given work must have: this package, and the directory of the run."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.errors import UserError
from rlhf_ray.storage import url_of


class _Found(NamedTuple):
    """What a node has. files: of the package, by name, a hash; None if it is not there. writes: why not, or empty."""

    files: dict[str, str] | None
    sees: bool
    writes: str


def _inspection() -> Callable[[str | None, str | None], tuple[Any, ...]]:
    """A function that looks at the node it runs on, and returns a `_Found` as a plain tuple.

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
        if copy is not None and files is not None:
            try:
                from rlhf_ray import storage

                storage.probe(Path(copy))
            except Exception as error:
                return files, True, str(error)
        if mark is None:
            return files, True, ""
        own = Path(f"{mark}-{ray.get_runtime_context().get_node_id()}")
        try:
            own.write_text("")
            own.unlink()
        except OSError as error:
            return files, Path(mark).exists(), error.strerror
        return files, Path(mark).exists(), ""

    return inspect


def check_nodes(node_ids: Iterable[str], directory: Path | None, timeout_s: float) -> None:
    """Raise UserError, with a line for each node that lacks the package, has another one than this process, does not
    share `directory` or cannot write there, or does not answer in time.

    node_ids: Ray's. directory: exists and can be written here; None: is not looked at. If it is the copy of a URL, that
    is written, and the copies are the nodes' own.
    """
    ids = set(node_ids)
    names = {node["NodeID"]: f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
             for node in ray.nodes()}
    inspect = _inspection()
    look = ray.remote(num_cpus=0, max_retries=0)(inspect)
    copy = str(directory) if directory and url_of(directory) else None
    # a new name: NFS remembers what is not there
    mark = str(directory / f".seen-{secrets.token_hex(8)}") if directory and not copy else None
    try:
        if mark:
            Path(mark).write_text("")
        asked = {look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
                 .remote(mark, copy): node for node in ids}
        ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        here = _Found(*inspect(None, None))
        problems = [f"{names[node]} {problem}" for answer, node in asked.items()
                    if (problem := _problem(answer, here, directory, timeout_s))]
    finally:
        if mark:
            with suppress(OSError):
                Path(mark).unlink(missing_ok=True)
    if problems:
        raise UserError("\n".join(problems))


def _problem(answer: Any, here: _Found, directory: Path | None, timeout_s: float) -> str:
    try:
        there = _Found(*ray.get(answer, timeout=0))
    except ray.exceptions.GetTimeoutError:
        return f"did not answer within cluster.start_timeout_s={timeout_s:.0f} s"
    except ray.exceptions.RayError as error:
        return f"cannot run a task: {' '.join(str(error).split())[-300:]}"
    if there.files is None:
        return "has no rlhf_ray: install it there, in the environment from which `ray start` is called"
    assert here.files is not None
    other = sorted(name for name in here.files.keys() | there.files if here.files.get(name) != there.files.get(name))
    if other:
        more = f" and {len(other) - 1} more files" if len(other) > 1 else ""
        return f"has another rlhf_ray than the driver ({other[0]}{more}): install the same version everywhere"
    if not there.sees:
        return f"does not share output_dir: {directory} is not the same directory there; give a path that all nodes see"
    if there.writes and directory and url_of(directory):
        return f"cannot use {there.writes}"
    if there.writes:
        return f"cannot write to output_dir, {directory}: {there.writes}; make it writable for the user that runs Ray"
    return ""
