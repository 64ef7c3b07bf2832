"""The real Ray, vLLM and DeepSpeed. Nothing here is a stand-in."""

from collections.abc import Iterator

import pytest

from end_to_end.small import TEXTS, small_config
from rlhf_ray.cluster.runtime import session
from rlhf_ray.models.tiny import save_untrained


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two untrained models of one shape and one tokenizer, with different weights."""
    cfg = small_config().pretrain
    cfg.vocab_size, cfg.hidden_size, cfg.num_layers, cfg.num_heads, cfg.intermediate_size = 320, 64, 2, 2, 128
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path_factory.mktemp("model") / "model")
        save_untrained(cfg, 64, TEXTS, paths[-1], seed)
    return [str(p) for p in paths]


@pytest.fixture
def ray_session() -> Iterator[None]:
    """A private Ray with room for every role."""
    cfg = small_config()
    cfg.cluster.num_cpus = 8
    with session(cfg):
        yield
