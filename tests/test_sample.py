"""The sample of re-computation's losses: what it is of, when it is enough, and that it goes on where it was."""

from dataclasses import replace

import numpy as np
import pytest

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.methods import recompute
from streamllm.errors import UsageError
from streamllm.measuring import sample
from streamllm.measuring.measurements import Measurements
from streamllm.measuring.sample import BATCH, LEAST_TOKENS, AutoSize, FixedSize, sample_batches, sample_positions
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TokenStream
from streamllm.policy import EvictionPolicy
from streamllm.terminal.arguments import sample_size

WINDOW = EvictionPolicy(n_sink=0, window_size=24)


@pytest.fixture
def measurements(tmp_path, golden_model, golden_tokens):
    stream = TokenStream(golden_tokens, "golden", "digest")
    return Measurements.of(MeasurementStore(tmp_path), golden_model("llama-tiny"), stream, 24)


def test_batches_are_spread_over_the_text_and_have_every_token_once():
    batches = list(sample_batches(1000, window=10))
    assert sorted(np.concatenate(batches)) == list(range(999))
    for batch in batches[:-1]:
        assert [place * BATCH // 999 for place in batch] == list(range(BATCH)), "one of each eighth, ascending"
    again = list(sample_batches(1000, window=10))
    assert all((one == other).all() for one, other in zip(batches, again, strict=True))
    assert len({place - place * BATCH // 999 * 125 for place in batches[0]}) > 4, "not the same place of each eighth"


def test_a_text_of_one_window_is_one_batch():
    (batch,) = sample_batches(25, window=24)
    assert batch.tolist() == list(range(24))


def test_a_sample_grows_where_it_was(measurements, monkeypatch):
    asked = []
    losses_at = recompute.losses_at

    def counting(loaded, tokens, window, positions, *rest):
        asked.extend(positions)
        return losses_at(loaded, tokens, window, positions, *rest)

    monkeypatch.setattr(recompute, "METHOD", replace(recompute.METHOD, losses_at=counting))
    first = measurements.quality(Configuration("recompute", WINDOW), size=FixedSize(10))
    assert first.is_fresh and len(first.losses) == len(asked) == 2 * BATCH
    same = measurements.quality(Configuration("recompute", WINDOW), size=FixedSize(10))
    assert not same.is_fresh and (same.losses == first.losses).all()
    more = measurements.quality(Configuration("recompute", WINDOW), size=FixedSize(40))
    assert more.is_fresh and len(asked) == len(set(asked)) == 40, "nothing is computed again"
    whole = losses_at(measurements.loaded, measurements.stream.tokens, 24, sorted(asked), BACKENDS["auto"])
    np.testing.assert_allclose(more.losses, np.column_stack((sorted(asked), whole)), atol=1e-6)
    assert more.losses[:, 0].tolist() == sample_positions(len(measurements.stream.tokens), 24, 40).tolist()
    stored = measurements.store.losses(more.record["quality_entry"])
    assert (stored == more.losses).all()


def test_all_of_a_text(measurements):
    tokens = len(measurements.stream.tokens)
    found = measurements.quality(Configuration("recompute", WINDOW), size=FixedSize(tokens))
    assert found.losses[:, 0].tolist() == list(range(tokens - 1))


def test_auto_ends_when_it_is_precise_or_time_is_up(monkeypatch):
    random = np.random.default_rng(0)
    reference = np.column_stack((np.arange(4000.0), np.zeros(4000)))

    def taken(size, spread):
        table = np.empty((0, 2))
        for batch in sample_batches(4001, 10):
            if len(table) and size.reached(table):
                break
            table = np.concatenate((table, np.column_stack((batch, spread * random.normal(size=len(batch))))))
        return len(table)

    assert taken(AutoSize(reference, 60), 1e-4) == LEAST_TOKENS
    assert LEAST_TOKENS < taken(AutoSize(reference, 60), 0.02) < 600
    assert taken(AutoSize(reference, 0), 1.0) == LEAST_TOKENS, "the least whatever it takes"
    clock = iter(range(1000))
    monkeypatch.setattr(sample.time, "monotonic", lambda: next(clock))
    assert taken(AutoSize(reference, 30, _started=0), 1.0) == LEAST_TOKENS + 31 * BATCH


@pytest.mark.parametrize(("text", "tokens"), [("auto", None), ("all", 0), ("64", 64)])
def test_sizes(text, tokens):
    assert sample_size(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_no_sizes(text):
    with pytest.raises(UsageError, match=f"baseline_tokens '{text}': must be a whole number >= 1, 'all' or 'auto'"):
        sample_size(text)
