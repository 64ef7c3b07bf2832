"""A run's files at a URL: every node works in a copy, and the URL is what counts."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import register_implementation

from rlhf_ray import remote, storage
from rlhf_ray.errors import UserError
from rlhf_ray.storage import CACHE, fetch, local_root, publish, run_name, settle, shown, small, url_of, withdraw

ROOT = Path(__file__).parents[1]


class Objects(MemoryFileSystem):
    """What s3fs has otherwise: no directories, other positional arguments, no ranges of an empty object."""

    protocol = "objects"
    async_impl = True
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("objects://").strip("/")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError("this would make a bucket")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cat_file(self, path: str, version: None = None, start: int | None = None, end: int | None = None) -> bytes:
        assert version is None and (start is None or self.size(path))
        return super().cat_file(path, start, end)


@pytest.fixture(params=["memory", "file", "objects"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a run that is still to begin; this machine keeps its copies in `tmp_path/a`."""
    monkeypatch.setenv(CACHE, str(tmp_path / "a"))
    register_implementation("objects", Objects, clobber=True)
    yield f"file://{tmp_path}/there/run" if request.param == "file" else f"{request.param}://{tmp_path.name}/run"
    MemoryFileSystem.store.clear()
    Objects.store.clear()
    storage.renew()


def there(url: str) -> dict[str, str]:
    """Every file at the URL, with its text."""
    fs, root = url_to_fs(url)
    return {name[len(root) + 1 :]: fs.cat_file(name).decode() for name in fs.find(root)}


def here(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*") if p.is_file()}


def put(root: Path, **texts: str) -> None:
    """Files by name, `__` for a slash and `_` for a dot."""
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def published(root: Path, **texts: str) -> None:
    put(root, **texts)
    publish(root)
    settle()


# --- paths ---


@pytest.mark.parametrize("given", ["s3://bucket/team/run", "gs://bucket/run", "file:///nfs/run", "memory://run",
                                   "abfs://container@account.dfs.core.windows.net/run", "sftp://me@host/a b/run"])
def test_a_path_says_what_it_is_a_copy_of(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    root = local_root(given)
    assert root.is_absolute() and root.name == given.rpartition("/")[2] and root.parents[1] == tmp_path
    assert url_of(root) == given == shown(root)
    assert url_of(root / "sft/model/config.json") == f"{given}/sft/model/config.json"
    assert local_root(given + "/") == root
    begun = root / "ppo/checkpoints/.step-00000012.tmp"
    assert url_of(begun / "x") == f"{given}/ppo/checkpoints/step-00000012/x"  # its final name from the start


@pytest.mark.parametrize(("given", "name"), [
    ("/runs/first", "first"), ("/runs/x/../first/", "first"), ("runs/first", "first"),
    ("/runs/a/seed=1", "a/seed=1"), ("/runs/b/seed=1", "b/seed=1"),  # of two sweeps
    ("s3://bucket/team/run", "run"), ("s3://bucket/team/a/algorithm=ppo,seed=1", "a/algorithm=ppo,seed=1"),
])
def test_what_a_run_is_called(given: str, name: str) -> None:
    assert run_name(local_root(given)) == name


def test_without_an_environment_variable_copies_are_in_the_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    assert local_root("s3://bucket/run") == Path(f"/tmp/rlhf_ray-{os.getuid()}/s3%3A%2F%2Fbucket/run").absolute() or \
        "TMPDIR" in os.environ


def test_any_other_path_is_left_alone_and_costs_no_import(tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from pathlib import Path
        from rlhf_ray import storage
        path = Path({str(tmp_path)!r}) / "new"
        assert storage.local_root(str(path)) == path and storage.shown(path) == str(path)
        storage.fetch(path), storage.publish(path), storage.withdraw(path), storage.probe(path), storage.settle()
        assert not path.exists() and "fsspec" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- to and from the URL ---


def test_what_one_machine_publishes_another_fetches(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(local_root(url), ppo__metrics_jsonl="1\n", ppo__stage_json="{}", sft__model__config_json="c",
              ppo__wandb__run="w")
    assert there(url) == {"ppo/metrics.jsonl": "1\n", "ppo/stage.json": "{}", "sft/model/config.json": "c",
                          "ppo/wandb/run": "w"}
    monkeypatch.setenv(CACHE, str(tmp_path / "b"))
    fetch(local_root(url), small)  # models when they are needed
    assert here(local_root(url)) == {"ppo/metrics.jsonl": "1\n", "ppo/stage.json": "{}"}
    fetch(local_root(url) / "sft/model")
    assert here(local_root(url) / "sft") == {"model/config.json": "c"}


def test_only_what_is_another_travels(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    down, up = remote.download, remote.upload
    monkeypatch.setattr(remote, "download", lambda there, file: calls.append(f"down {there[-1]}") or down(there, file))
    monkeypatch.setattr(remote, "upload", lambda file, there: calls.append(f"up {there[-1]}") or up(file, there))
    published(local_root(url), a="1", b="2")
    assert sorted(calls) == ["up a", "up b"]
    published(local_root(url), b="3")
    fetch(local_root(url))
    assert calls[2:] == ["up b"]  # of as many bytes as before
    monkeypatch.setenv(CACHE, str(tmp_path / "b"))
    fetch(local_root(url))
    fetch(local_root(url))
    assert sorted(calls[3:]) == ["down a", "down b"]
    monkeypatch.setenv(CACHE, str(tmp_path / "a"))
    published(local_root(url), a="4")
    monkeypatch.setenv(CACHE, str(tmp_path / "b"))
    fetch(local_root(url))
    assert calls[5:] == ["up a", "down a"]
    assert here(local_root(url)) == {"a": "4", "b": "3"}


def test_the_url_wins(url: str) -> None:
    """What another machine deleted goes, what this one wrote and did not publish goes, what was damaged comes anew."""
    root = local_root(url)
    published(root, a="1", b="2", old__c="3")
    put(root, b="spoilt", unpublished="4", old__c="more than it was")
    withdraw(root / "old")
    settle()
    fetch(root)
    assert here(root) == {"a": "1", "b": "2"} and not (root / "old").exists()


def test_what_is_of_one_node_alone_stays_there(url: str) -> None:
    root = local_root(url)
    for name in (".lock", "sft/model.tmp/x", "sft/model.old/x", "ppo/stage.json.tmp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    published(root, a="1")
    fetch(root)
    assert set(there(url)) == {"a"} and len(here(root)) == 5


def test_a_model_is_replaced_as_a_whole(url: str) -> None:
    """No file of the old one is left to be taken for one of the new."""
    model = local_root(url) / "sft/model"
    published(model, config_json="1", chat_template="old")
    (model / "chat.template").unlink()
    put(model, config_json="2")
    publish(model, exact=True)
    settle()
    assert there(url) == {"sft/model/config.json": "2"}


def test_the_record_is_published_last_and_withdrawn_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    upload = remote.upload
    monkeypatch.setattr(remote, "upload", lambda file, there: order.append(file.name) or upload(file, there))
    stage = local_root(url) / "sft"
    published(stage, a="", manifest_json="", stage_json="", z="")
    assert set(order[:2]) == {"a", "z"} and set(order[2:]) == {"manifest.json", "stage.json"}

    class Killed(BaseException):
        pass

    def killed(fs: Any, path: str, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(type(url_to_fs(url)[0]), "rm", killed)
        withdraw(stage)
        settle()
    storage.renew()
    assert set(there(url)) == {"sft/a", "sft/z"}
    withdraw(stage)
    withdraw(stage)  # nothing to do
    settle()
    assert there(url) == {}


def test_after_one_has_failed_no_further_upload_is_begun(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the old checkpoint is there for as long as the new one is not."""
    root = local_root(url)
    published(root, old="1")

    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError("403 Forbidden\nRequestId: 7")

    with monkeypatch.context() as patched:
        patched.setattr(type(url_to_fs(url)[0]), "put_file", refused)
        put(root, new="2")
        publish(root)
        withdraw(root / "old")
        for _ in range(2):
            with pytest.raises(UserError) as error:
                settle()
    line = str(error.value)
    assert line.startswith(f"output_dir: cannot write {url}/new from ") and "\n" not in line
    assert "PermissionError: 403 Forbidden; look at" in line and there(url) == {"old": "1"}


def test_of_several_on_a_node_one_downloads(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(local_root(url), model="m")
    monkeypatch.setenv(CACHE, str(tmp_path / "b"))
    downloads: list[str] = []
    download = remote.download
    monkeypatch.setattr(remote, "download", lambda there, file: downloads.append(there) or download(there, file))
    threads = [threading.Thread(target=fetch, args=(local_root(url),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == [f"{url}/model"]


def test_who_only_looks_has_a_copy_of_his_own(url: str) -> None:
    root = local_root(url)
    published(root, ppo__metrics_jsonl="1\n", sft__model__weights="w")
    put(root, ppo__metrics_jsonl="1\n2\n")  # the driver is ahead of the URL
    with storage.reading(url) as copy:
        assert here(copy) == {"ppo/metrics.jsonl": "1\n"} and url_of(copy) == url
        fetch(copy / "sft/model")
        assert (copy / "sft/model/weights").read_text() == "w"
    assert not copy.exists() and here(root)["ppo/metrics.jsonl"] == "1\n2\n"


def test_files_keep_the_time_at_which_they_were_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rlhf-ray watch` says how long ago that was."""
    monkeypatch.setenv(CACHE, str(tmp_path / "a"))
    root = local_root(f"file://{tmp_path}/there/run")
    published(root, a="1")
    os.utime(tmp_path / "there/run/a", (1e9, 1e9))
    fetch(root)
    assert (root / "a").stat().st_mtime == 1e9


def test_sizes_and_contents_are_those_at_the_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "copies"))
    monkeypatch.setattr(storage, "_PIECE", 3)
    root = local_root(url)
    published(root, a="1234", sub__b="")
    for text, (file, size) in (("1234", (root / "a", 4)), ("", (root / "sub/b", 0))):
        (tmp_path / "here").write_text(text)
        assert storage.digest(file, size) == storage.digest(tmp_path / "here", size)
    put(root, a="here only", c="here only")
    assert storage.sizes(root) == {root / "a": 4} and storage.sizes(root / "a") == {root / "a": 4}


# --- what cannot work ---


def test_a_place_that_can_be_written_passes_and_keeps_nothing(url: str) -> None:
    storage.probe(local_root(url))
    assert there(url) == {}


def test_a_copy_that_cannot_be_made_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "/dev/null/copies")
    with pytest.raises(UserError, match=f"^output_dir={url}: cannot make its copy /dev/null/.*: Not a directory; set"):
        storage.probe(local_root(url))
