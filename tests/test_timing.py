from streamllm import timing
from streamllm.backends import BACKENDS
from streamllm.policy import EvictionPolicy, steady_state


class CountingDecoder:
    """Counts what it is fed; what a segment spans is then known without a clock."""

    def __init__(self):
        self.fed = []

    def feed(self, tokens):
        self.fed.append(len(tokens))


def test_segments_are_whole_prune_cycles_of_a_full_cache(golden_model, golden_tokens, monkeypatch):
    decoder, policy = CountingDecoder(), EvictionPolicy(n_sink=2, window_size=30, compress_every=8, max_drop=3)
    monkeypatch.setattr(timing, "make_decoder", lambda *_: decoder)
    monkeypatch.setattr(timing, "SEGMENT_SEC", 1e-4)
    speed = timing.measure_speed(golden_model("neox-tiny"), "ours", policy, BACKENDS["auto"], golden_tokens)
    steady = steady_state(policy)
    assert decoder.fed[0] == 31, "the prefill stops short of the first eviction"
    assert speed.tokens_per_segment % steady.cycle == 0
    timed = timing.SEGMENTS * speed.tokens_per_segment
    assert sum(decoder.fed) - timed >= steady.start + timing.WARMUP_TOKENS
    assert len(speed.segment_tpot_ms) == timing.SEGMENTS
    assert speed.tpot_ms.low <= speed.tpot_ms.value <= speed.tpot_ms.high
