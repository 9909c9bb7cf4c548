"""How many kernels a decoded token costs per layer: on a GPU that is the time of an eager step, whatever they compute.

What the model itself runs is transformers' affair: its layers are counted with a plain forward of one token and taken
off. What is left is the method's: attention, what it keeps, turns and throws away. Kernels are counted as operators
that are not views; a GPU has the same ones.
"""

from typing import Any

import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.decoder import make_decoder
from streamllm.engine.methods.recompute import WholeWindow
from streamllm.engine.model import LoadedModel
from streamllm.policy import EvictionPolicy

from .dispatched import looking
from .tiny_models import tiny_model

_NO_KERNEL = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::empty", "aten::detach", "aten::lift_fresh"}
TOKENS = 16
"""Two cycles of R = 8."""

BUDGETS = {
    ("ring", 1): (10, 18),
    ("ring", 8): (13, 30),  # attention and the whole step know of a mask
    ("ours", 1): (13, 6),
    ("ours", 8): (4.25, 1.625),
    ("mit", 1): (17, 1),
    ("mit", 8): (15.25, 1),
    ("dense", 1): (3, 1),
}
"""(method, compress_every): operators per token, prunes included, in a layer (attention is one of them) and beside the
layers. Of GPTNeoX, whose heads are rotary in part; where all of a head is, turning it is one less."""


class Counted:
    """The operators that launch a kernel."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += not func.is_view and func._schema.name not in _NO_KERNEL


def of_a_token(method: str, policy: EvictionPolicy, loaded: LoadedModel) -> float:
    """Operators, in the steady state, prunes included."""
    decoder, counted = make_decoder(loaded, Configuration(method, policy)), Counted()
    tokens = torch.ones(3 * policy.kept + 2 * TOKENS, dtype=torch.long).split(1)
    with torch.no_grad():
        for token in tokens[:-TOKENS]:
            decoder.feed(token)
    with looking(counted):
        for token in tokens[-TOKENS:]:
            decoder.feed(token)
    return counted.count / TOKENS


def of_the_model(loaded: LoadedModel) -> int:
    counted, token = Counted(), torch.ones(1, dtype=torch.long)
    with looking(counted):
        loaded.forward(token[None], token, WholeWindow(loaded, BACKENDS["auto"]), 1)
    return counted.count


@pytest.fixture(scope="module")
def models():
    """Of two layers and of three: the difference is a layer."""
    return [tiny_model("GPTNeoX", torch.float32, num_hidden_layers=layers) for layers in (2, 3)]


@pytest.mark.parametrize(("method", "compress_every"), BUDGETS)
def test_a_token_launches_no_more_than_its_budget(method, compress_every, models):
    policy = EvictionPolicy(n_sink=4, window_size=12, compress_every=compress_every)
    two, three = (of_a_token(method, policy, loaded) for loaded in models)
    own_two, own_three = map(of_the_model, models)
    layer = three - two - (own_three - own_two) + 1  # the model's own has attention's operator too
    beside = two - own_two - 2 * (layer - 1)
    budgets = BUDGETS[method, compress_every]
    assert layer <= budgets[0] and beside <= budgets[1], f"{layer} per layer and {beside} beside, not {budgets}"
    assert layer > budgets[0] - 1 and beside > budgets[1] - 1, "lower the budget, or the next addition goes unseen"


def test_kept_positions_cost_a_ring_nothing(models):
    """As many operators as where there are no sinks to turn, or fewer."""
    kept, without = EvictionPolicy(n_sink=4, window_size=12, positions="keep"), EvictionPolicy(n_sink=0, window_size=16)
    assert of_a_token("ring", kept, models[0]) <= of_a_token("ring", without, models[0])
