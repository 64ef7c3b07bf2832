"""The real Ray, vLLM and DeepSpeed. Nothing here is a stand-in."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from end_to_end.small import TEXTS, small_config
from rlhf_ray.cluster.runtime import session
from rlhf_ray.models.tiny import save_untrained

# Of the clusters that tests start: no worker for each CPU at the first job. No role can use one, for all have an
# environment of their own.
os.environ.update({"RAY_prestart_worker_first_driver": "0"})


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


@pytest.fixture(scope="session")
def untied_models(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models with an output head of their own and 384 tokens, 64 more than the tokenizer knows."""
    paths = []
    for seed, path in enumerate(models):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(path, vocab_size=384, tie_word_embeddings=False)
        paths.append(str(tmp_path_factory.mktemp("untied") / "model"))
        LlamaForCausalLM(config).save_pretrained(paths[-1])
        AutoTokenizer.from_pretrained(path).save_pretrained(paths[-1])
    return paths


@pytest.fixture(scope="session")
def reward_model(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model with a random head, so that scores differ."""
    torch.manual_seed(3)
    path = str(tmp_path_factory.mktemp("reward") / "model")
    model = AutoModelForSequenceClassification.from_pretrained(models[0], num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(path)
    return path


_ray = ExitStack()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray with room for every role; all tests that ask for it have the same, one after the other."""
    cfg = small_config()
    cfg.cluster.num_cpus = 9
    with _ray:
        _ray.enter_context(session(cfg))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They come first, for the others start a Ray of their own and want it to be the only one."""
    items.sort(key=lambda item: "ray_session" not in getattr(item, "fixturenames", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "ray_session" not in getattr(item, "fixturenames", ()):
        _ray.close()
