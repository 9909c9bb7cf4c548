"""Text without end: what is written, what it takes, and how it ends."""

import io
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from streamllm.configuration import Configuration
from streamllm.engine.decoder import make_decoder
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.errors import UsageError
from streamllm.explain.writing import Sampler, Sampling, Writer
from streamllm.policy import EvictionPolicy
from streamllm.terminal.screen import Screen

POLICY = EvictionPolicy(n_sink=4, window_size=60)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def testbed():
    return load_model("testbed", "float32"), load_tokenizer("testbed")


def writer(testbed, method="ring", temperature=0.0, policy=POLICY, seed=0):
    decoder = make_decoder(testbed[0], Configuration(method, policy))
    return Writer(*testbed, decoder, Sampler(Sampling(temperature, top_k=40), CPU, seed), testbed[0].kv_bytes)


def test_the_text_is_the_tokens_decoded(testbed):
    """Greedy, with every method the same; the cache stays as it is while the text goes on."""
    loaded, tokenizer = testbed
    texts = {}
    for method in ("ring", "ours"):
        one = writer(testbed, method)
        texts[method] = one.read("The with statement") + "".join(one.write() for _ in range(120))
        assert one.decoder.kv_length == 64
        assert one.seen == len(tokenizer("The with statement")["input_ids"]) + 120
    assert texts["ring"] == texts["ours"]
    ids = tokenizer("The with statement")["input_ids"]
    decoder = make_decoder(loaded, Configuration("mit", POLICY))
    with torch.inference_mode():
        for i in range(len(ids) + 119):
            logits = decoder.feed(torch.tensor([ids[i]]))
            if i + 1 == len(ids):
                ids.append(int(logits[-1].argmax()))
    assert texts["ring"] == tokenizer.decode(ids)


def test_a_prompt_longer_than_the_cache_follows_the_policy(testbed):
    loaded, tokenizer = testbed
    prompt = "The with statement is used to wrap the execution of a block. " * 8
    one = writer(testbed)
    assert one.read(prompt) == prompt
    assert one.seen > 2 * POLICY.kept and one.decoder.kv_length == POLICY.kept
    reference = make_decoder(loaded, Configuration("mit", POLICY))
    with torch.inference_mode():
        for token in torch.tensor(tokenizer(prompt)["input_ids"]).split(1):
            logits = reference.feed(token)
    torch.testing.assert_close(one.logits, logits, rtol=0, atol=1e-3)


def test_without_streaming_the_cache_grows_past_what_the_model_was_trained_on(testbed):
    one = writer(testbed, "dense", temperature=1.0, policy=EvictionPolicy(n_sink=4, window_size=252))
    one.read("The")
    sizes, overgrown = [], []
    for _ in range(300):
        one.write()
        sizes.append(one.decoder.kv_length)
        overgrown.append(one.overgrown)
    assert np.diff(sizes).tolist() == [1] * 299
    assert overgrown == [size > 256 for size in sizes] and overgrown[-1]
    assert one.kv_megabytes == sizes[-1] * 2 * 6 * 192 * 4 / 1e6


def test_a_seed_is_a_text(testbed):
    def text(seed):
        one = writer(testbed, temperature=0.8, seed=seed)
        return one.read("A") + "".join(one.write() for _ in range(30))

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {1, 2}),
        (Sampling(top_p=0.6), {1, 2}),
        (Sampling(top_p=0.4), {1}),
        (Sampling(temperature=0.0, top_k=3), {1}),
        (Sampling(temperature=0.02), {1}),
    ],
)
def test_what_may_be_picked(sampling, allowed):
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log()
    sampler = Sampler(sampling, CPU)
    assert {int(sampler.pick(logits)) for _ in range(400)} == allowed


def test_values_out_of_range(testbed):
    for wrong, message in (
        ({"temperature": -1}, "temperature -1"),
        ({"top_k": -2}, "top_k -2"),
        ({"top_p": 0}, "top_p 0"),
    ):
        with pytest.raises(UsageError, match=message):
            Sampling(**wrong)
    with pytest.raises(UsageError, match="prompt ''"):
        writer(testbed).read("")


def test_bytes_that_are_no_text_do_not_stop_it(testbed):
    """A model of bytes may write any."""
    one = writer(testbed)
    tokens = np.random.default_rng(0).integers(0, 1024, size=3000)
    text = "".join(one._piece(int(token)) for token in tokens)
    whole = testbed[1].decode(tokens)
    assert len(text) > 0.9 * len(whole)

    class Stuck:
        def step(self, *_):
            raise Exception("Invalid prefix encountered")  # what the library raises, for some tokenizers

    one.pieces = Stuck()
    token = testbed[1]("the")["input_ids"][0]
    assert [one._piece(token) for _ in range(2)] == ["\ufffd", testbed[1].decode([token])]


def test_the_screen_shows_texts_side_by_side_and_what_they_hold(testbed):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20, color_system=None)
    writers = {"one": writer(testbed), "two": writer(testbed, "dense")}
    with Screen(writers, console) as screen:
        for title, one in writers.items():
            screen.add(title, one.read("The with statement"))
            for _ in range(100):
                screen.add(title, one.write())
    page = console.file.getvalue()[-4000:]
    assert "─ one ─" in page and "─ two ─" in page
    assert "KV cache 64 tokens" in page and f"KV cache {writers['two'].seen} tokens" in page
    assert {len(line) for line in page.splitlines() if line.startswith("│")} == {100}


def generate(*arguments, **options):
    command = [sys.executable, "-m", "streamllm", "generate", "--threads", "1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_an_interrupt_ends_it_with_a_summary():
    process = generate("--prompt", "The with statement")
    first = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert first.startswith("The with statement") and rest.endswith("\n")
    assert errors.count("\n") == 1 and "tokens seen" in errors and "KV cache" in errors


def test_two_texts_without_end_need_a_terminal():
    process = generate("--dense")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == "error: dense: two texts without end go on a terminal only; give --max-new-tokens N\n"
