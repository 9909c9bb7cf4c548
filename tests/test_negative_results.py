"""What the source documents report as failures, held to what is measured today (`tests/benchmarks/cliff`,
`tests/benchmarks/negative_results`), on a scale of seconds."""

import numpy as np
import pytest

from streamllm.block_parallel import block_parallel_losses
from streamllm.models import load_model, load_tokenizer
from streamllm.policy import EvictionPolicy, with_derived_window
from streamllm.text import TextSource, load_tokens


@pytest.fixture(scope="module")
def testbed():
    return load_model("testbed", "float32")


@pytest.fixture(scope="module")
def text(testbed):
    source = TextSource(max_eval_tokens=1400)
    return load_tokens(source, load_tokenizer("testbed"), testbed.model.config.vocab_size).tokens


def test_the_cliff_is_where_the_trained_range_ends_and_not_where_r_is_128(testbed, text):
    """The embedded model was trained on 256 positions: at R = 128 a nominal total of 256 grows to 384."""

    def percent_over_vanilla(total, accounting):
        lazy, vanilla = (
            block_parallel_losses(
                testbed, text, with_derived_window(EvictionPolicy(compress_every=r), total, accounting)
            )
            for r in (128, 1)
        )
        return 100 * np.expm1((lazy - vanilla)[400:].mean())

    assert percent_over_vanilla(256, "nominal") > 30
    assert abs(percent_over_vanilla(256, "peak")) < 3
    assert abs(percent_over_vanilla(128, "nominal")) < 3, "the same R and growth, within the trained range"
