"""What a learner says. What it computes: tests/end_to_end/test_learner.py."""

import pytest

from rlhf_ray.engines.learner import where_broken

LAYER = ["model.layers.11.self_attn.q_proj.weight", "model.layers.11.input_layernorm.weight"]


@pytest.mark.parametrize(("names", "said"), [
    ([], "no parameter by itself: their norm is not finite"),
    (["model.embed_tokens.weight"], "1 of 20 parameters, and backwards first model.embed_tokens.weight"),
    (["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", *LAYER],
     "4 of 20 parameters, and backwards first model.layers.11 (self_attn.q_proj.weight, input_layernorm.weight)"),
    ([f"h.0.{name}" for name in "abcde"], "5 of 20 parameters, and backwards first h.0 (a, b, c and 2 more)"),
    ([*LAYER, "model.norm.weight"], "3 of 20 parameters, and backwards first model.norm.weight"),
])
def test_the_last_layer_with_broken_gradients_is_named(names, said):
    assert where_broken(names, 20) == said
