"""Parts of parameters: cut by as many ranks as saved them, or more, or fewer.

The parameter of these tests is w = 1, 2, 3, 4, 5. Two ranks hold 1 2 3 and 4 5 0, three 1 2, 3 4 and 5 0, four
1 2, 3 4, 5 0 and 0 0: equal parts, padded with zeros at the end.
"""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.errors import UserError
from rlhf_ray.models.shards import SavedFile, Shards, shard_name, write_tensors

PARTS = {
    1: [[1, 2, 3, 4, 5]],
    2: [[1, 2, 3], [4, 5, 0]],
    3: [[1, 2], [3, 4], [5, 0]],
    4: [[1, 2], [3, 4], [5, 0], [0, 0]],
    7: [[1], [2], [3], [4], [5], [0], [0]],
}


def save(directory: Path, ranks: int, role: str = "policy") -> None:
    """w, its `exp_avg` (ten times w), and what each rank keeps for itself."""
    for rank, part in enumerate(PARTS[ranks]):
        w = torch.tensor(part, dtype=torch.float32)
        write_tensors(directory / shard_name(role, rank, ranks),
                      {"w|weight": w, "w|exp_avg": 10 * w, "rng": torch.tensor([rank], dtype=torch.uint8)},
                      {"steps_done": 7})


@pytest.mark.parametrize("after", PARTS)
@pytest.mark.parametrize("before", PARTS)
def test_what_some_ranks_saved_any_other_number_loads(before: int, after: int, tmp_path: Path) -> None:
    save(tmp_path, before)
    with Shards(tmp_path, "policy") as shards:
        for rank, expected in enumerate(PARTS[after]):
            assert shards.part("w", "weight", 5, rank, after).tolist() == expected
            assert shards.part("w", "exp_avg", 5, rank, after).tolist() == [10 * x for x in expected]


def test_the_padding_of_the_file_is_no_value_of_the_parameter(tmp_path: Path) -> None:
    """Whatever a rank has in its padding: others get zeros."""
    write_tensors(tmp_path / shard_name("policy", 0, 2), {"w|weight": torch.tensor([1.0, 2.0, 3.0])}, {})
    write_tensors(tmp_path / shard_name("policy", 1, 2), {"w|weight": torch.tensor([4.0, 5.0, math.nan])}, {})
    with Shards(tmp_path, "policy") as shards:
        assert [shards.part("w", "weight", 5, rank, 3).tolist() for rank in range(3)] == PARTS[3]
        assert shards.part("w", "weight", 5, 1, 2).tolist() == [4, 5, 0]


@pytest.mark.parametrize("ranks", PARTS)
def test_a_whole_parameter_has_its_shape(ranks: int, tmp_path: Path) -> None:
    save(tmp_path, ranks)
    with Shards(tmp_path, "policy") as shards:
        assert shards.whole("w", "weight", (5, 1)).tolist() == [[1], [2], [3], [4], [5]]


def test_names_and_header(tmp_path: Path) -> None:
    save(tmp_path, 2)
    write_tensors(tmp_path / "critic-00000-of-00001.safetensors", {"v|weight": torch.zeros(1)}, {"of": ["critic", 1]})
    with Shards(tmp_path, "policy") as shards:
        assert (shards.names(), shards.names("exp_avg"), shards.names("exp_avg_sq")) == (["w"], ["w"], [])
        assert shards.header == {"steps_done": 7}
    with Shards(tmp_path, "critic") as shards:  # roles lie side by side
        assert (shards.names(), shards.header) == (["v"], {"of": ["critic", 1]})


def test_what_a_rank_keeps_for_itself_is_of_no_use_to_another_number_of_ranks(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with Shards(tmp_path, "policy") as shards:
        own = [shards.own("rng", rank, 2) for rank in range(2)]
        assert [x.tolist() for x in own if x is not None] == [[0], [1]]
        assert own[0] is not None and own[0].dtype == torch.uint8
        assert shards.own("rng_cuda", 0, 2) is None
        assert shards.own("rng", 0, 1) is None and shards.own("rng", 0, 3) is None


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_role_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(UserError, match=f"{tmp_path} holds nothing of the role critic"):
        Shards(tmp_path, "critic")


def test_another_model_has_other_names(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with Shards(tmp_path, "policy") as shards, pytest.raises(UserError) as error:
        shards.part("v", "weight", 5, 0, 2)
    assert str(error.value).startswith(f"{tmp_path}/policy-00000-of-00002.safetensors has no weight of v: ")


def test_another_model_has_other_sizes(tmp_path: Path) -> None:
    """7 elements would be parts of 4 in each of the two files, which hold 3."""
    save(tmp_path, 2)
    with Shards(tmp_path, "policy") as shards, pytest.raises(UserError) as error:
        shards.part("w", "exp_avg", 7, 0, 1)
    assert str(error.value).startswith(
        f"{tmp_path}/policy-00000-of-00002.safetensors: exp_avg of w has 3 elements, 4 were expected: ")


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_saved_file_says_what_lies_there(tmp_path: Path) -> None:
    path = tmp_path / shard_name("policy", 3, 16)
    saved = write_tensors(path, {"w|weight": torch.ones(4)}, {})
    written = path.read_bytes()
    assert saved == SavedFile("policy-00003-of-00016.safetensors", len(written), hashlib.sha256(written).hexdigest())


def test_what_cannot_be_written_is_said_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "policy-00000-of-00001.safetensors"
    with pytest.raises(UserError, match=f"cannot write {path}: No such file or directory; "):
        write_tensors(path, {"w|weight": torch.ones(4)}, {})


def test_the_library_reads_what_is_written_whatever_the_shape(tmp_path: Path) -> None:
    tensors = {"a|weight": torch.arange(6.0).reshape(2, 3).T, "rng": torch.arange(5, dtype=torch.uint8),
               "none|weight": torch.zeros(0), "one|weight": torch.tensor(3.0),
               "logprobs": torch.tensor([-1e-300, -7.0], dtype=torch.float64)}
    saved = write_tensors(tmp_path / "x.safetensors", tensors, {"steps": 1})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and found[name].shape == t.shape and (found[name] == t).all()
               for name, t in tensors.items())
    assert saved.sha256 == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
