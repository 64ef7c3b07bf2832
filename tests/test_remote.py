"""What fsspec does for us; and how it says what goes wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from rlhf_ray import remote
from rlhf_ray.errors import UserError


@pytest.mark.parametrize("given", ["s3://key:secret@bucket/run", "https://host/run?token=secret"])
def test_a_secret_in_the_url_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(UserError, match=r"output_dir=.*carries a password or other") as error:
        remote.check_url(given)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("given", ["s3://", "S3 bucket://x/run", "simplecache::s3://bucket/run", "s3://" + "b/" * 99])
def test_a_url_that_names_no_directory_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="expected PROTOCOL://PLACE/NAME"):
        remote.check_url(given)


@pytest.mark.parametrize("given", ["s3://bucket/team/run", "file:///nfs/run", "sftp://me@host/run",
                                   "abfs://container@account.dfs.core.windows.net/run"])
def test_others_pass(given: str) -> None:
    remote.check_url(given)


def test_a_file_is_another_if_its_size_its_time_or_its_tag_is() -> None:
    info = {"size": 3, "LastModified": "t", "ETag": "e", "StorageClass": "any"}
    assert remote.version(info) == remote.version({**info, "StorageClass": "another"})
    assert len({remote.version({**info, key: "other"}) for key in info}) == 4
    assert remote.version({"size": 3, "name": "x"}) is None  # two models may be as large


def test_a_file_of_this_machine_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(fs: Any, source: str, target: str, **options: Any) -> None:
        Path(target).write_text("ha")
        raise OSError("no space left")

    (tmp_path / "new").write_text("half")
    remote.write(f"file://{tmp_path}/there/x", b"old")
    monkeypatch.setattr(LocalFileSystem, "put_file", torn)
    with pytest.raises(UserError, match=r"cannot write .*there/x from .*: OSError: no space left; look at"):
        remote.upload(tmp_path / "new", f"file://{tmp_path}/there/x")
    assert remote.read(f"file://{tmp_path}/there/x") == b"old"


@pytest.mark.parametrize(("given", "reason"), [
    ("nosuch://bucket/run", "ValueError: Protocol not known: nosuch; look at the address"),
    ("gs://bucket/run", "ImportError: .*; install it on every node, or set another output_dir"),
    ("file:///dev/null/run", "NotADirectoryError: "),
])
def test_a_place_that_cannot_is_one_line(
    given: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given.startswith("gs"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(UserError, match=f"^output_dir: cannot write {given}/x from .*: {reason}") as error:
        remote.write(f"{given}/x", b"")
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all would be thought to be gone."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_text("1")
    assert list(remote.listing(f"file://{tmp_path}")) == ["sub/a"]
    ls = LocalFileSystem.ls

    def flaky(fs: LocalFileSystem, path: str, **options: Any) -> Any:
        if path.endswith("sub"):
            raise OSError("connection reset")
        return ls(fs, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", flaky)
    with pytest.raises(UserError, match=r"cannot list file://.*: OSError: connection reset"):
        remote.listing(f"file://{tmp_path}")
