"""What goes along with a job."""

from pathlib import Path
from zipfile import ZipFile

import pytest

from rlhf_ray.cluster import working_dir
from rlhf_ray.cluster.working_dir import collect, write
from rlhf_ray.errors import UserError


def tree(root: Path, *names: str, size: int = 1) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)


def test_what_git_ignores_what_runs_make_and_secrets_stay_here(tmp_path: Path) -> None:
    tree(tmp_path, "rewards.py", "words/good.txt", "words/bad.txt", "data/demos.jsonl", ".env", "words/.env.local",
         "outputs/a/model", "wandb/run/log", ".venv/bin/python", ".git/HEAD", "__pycache__/rewards.pyc",
         ".mypy_cache/x", "lib/outputs/kept.txt")
    (tmp_path / ".gitignore").write_text("data/\n")
    (tmp_path / "words" / ".rayignore").write_text("bad.txt\n")
    found = collect(tmp_path, [], [], {})
    assert sorted(found) == [".gitignore", "lib/outputs/kept.txt", "rewards.py", "words/.rayignore", "words/good.txt"]


def test_runs_stay_here_wherever_they_are(tmp_path: Path) -> None:
    """One to come, one under way, one that was copied without its dot files. Others' files may be called alike."""
    tree(tmp_path, "runs/next/notes.txt", "runs/now/.lock", "runs/now/sft/config.yaml", "runs/now/split.json",
         "runs/old/sft/stage.json", "runs/old/sft/model/model.safetensors", "runs/notes.txt", "theatre/stage.json",
         "poetry.lock")
    assert sorted(collect(tmp_path, [tmp_path / "runs/next"], [], {})) == ["poetry.lock", "runs/notes.txt",
                                                                         "theatre/stage.json"]
    assert sorted(collect(tmp_path / "runs/old", [], [], {})) == ["sft/model/model.safetensors", "sft/stage.json"]


def test_what_is_named_goes_along_in_any_case(tmp_path: Path) -> None:
    root, conf = tmp_path / "root", tmp_path / "conf"
    tree(root, "a.py", "data/demos.jsonl", "data/other.jsonl", "runs/old/.lock", "runs/old/sft/model/config.json")
    tree(conf, "experiment/mine.yaml", "__pycache__/x.pyc", ".env")
    (root / ".gitignore").write_text("data\n")
    named = [root / "data/demos.jsonl", root / "runs/old/sft/model", root / "a.py"]
    found = collect(root, [], named, {"config-dir-0": conf})
    assert sorted(found) == [".gitignore", "a.py", "config-dir-0/experiment/mine.yaml", "data/demos.jsonl",
                             "runs/old/sft/model/config.json"]
    assert found["config-dir-0/experiment/mine.yaml"] == conf / "experiment/mine.yaml"


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    tree(tmp_path / "root", "b", "a/c", "a/b")
    files = collect(tmp_path / "root", [], [], {})
    write(files, tmp_path / "1.zip")
    write(dict(reversed(files.items())), tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == ["a/b", "a/c", "b"]


def test_too_large_names_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_dir, "MOST_BYTES", 2**20)
    tree(tmp_path, "big/1", "big/2", size=2**19)
    tree(tmp_path, "small", size=2**18)
    with pytest.raises(UserError) as error:
        collect(tmp_path, [], [], {})
    assert f"{tmp_path} is too large to go along with a job: more than 1 MiB" in str(error.value)
    assert "big (" in str(error.value) and "absolute path" in str(error.value)
    monkeypatch.setattr(working_dir, "MOST_FILES", 2)
    monkeypatch.setattr(working_dir, "MOST_BYTES", 2**30)
    with pytest.raises(UserError, match="more than 2 files"):
        collect(tmp_path, [], [], {})
