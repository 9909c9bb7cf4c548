"""What caches forget: the texts, where their questions and answers are, and what counts as recalled."""

import json
import re
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch

from streamllm import __main__ as program
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.explain.recall import AskedStream, Question, answers, asked_stream, by_octave, summary, wilson
from streamllm.measuring.bench import Bench
from streamllm.measuring.hits import losses_and_hits
from streamllm.measuring.text import TokenStream
from streamllm.policy import EvictionPolicy, evicted_before
from streamllm.tasks import FOLDER, harness
from streamllm.tasks.texts import FIRST, TASKS, question_at, stream, words

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("task", TASKS)
def test_a_stream_asks_for_what_it_said(task):
    turns = stream(task, 6000, seed=3)
    assert turns == stream(task, 6000, seed=3) != stream(task, 6000, seed=4)
    said, answered = "", set()
    for turn in turns:
        said += turn.text
        fact = turn.fact
        assert all(said.count(needle) == 1 for needle in fact.needles)
        assert fact.needles[0].endswith(fact.answer.rstrip(".")) or fact.answer in fact.needles[0]
        assert fact.answer not in answered, "an answer stands in the text from then on"
        answered.add(fact.answer)
        said += f"\n{fact.question}\n{fact.lead} {fact.answer}.\n"
    assert len(turns) > (20 if TASKS[task].asked != "at a distance" else 30)


def test_the_newest_state_is_the_right_one():
    said = ""
    for turn in stream("recent", 8000, seed=0):
        said += turn.text
        ship = turn.fact.key
        assert re.findall(rf"the {ship} is at berth (\d+)\.", said)[-1] == turn.fact.answer
    for turn in stream("last", 4000, seed=0):
        assert re.findall(r"it is (\d+)\.", turn.text)[-1] == turn.fact.answer


def test_the_first_are_asked_for_late():
    turns = stream("first", 8000, seed=0)
    opening = turns[0].text.splitlines()[1 : FIRST + 1]
    assert words(turns[0].text) > 3900
    assert all(turn.fact.needles[0] in opening for turn in turns)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.asked == "at a distance"])
def test_distances_are_as_wanted(task):
    for distance in (64, 512, 4096):
        found = []
        for seed in range(8):
            turn = question_at(task, distance, seed)
            found.append(words(turn.text[turn.text.index(turn.fact.needles[0]) :]))
        assert distance / 2 < np.median(found) < 2 * distance
    goals = [words(turn.text) for turn in stream(task, 4000, seed=0)]
    assert 90 < np.median(goals) < 160


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("task", TASKS)
def test_where_questions_are(task, template):
    tokenizer = load_tokenizer("testbed")
    tokenizer.chat_template = template
    asked = asked_stream(task, 3000, tokenizer, seed=1)
    tokens = asked.stream.tokens
    assert len(tokens) == 3000 and len(asked.questions) >= 5
    turns = stream(task, 3000, 1, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    for question, turn in zip(asked.questions, turns, strict=False):
        assert tokenizer.decode(tokens[slice(*question.answer)]).strip() == turn.fact.answer
        before = tokenizer.decode(tokens[: question.answer[0]])
        assert before.endswith(turn.fact.lead)
        assert before.rindex(turn.fact.question) > max(map(before.rindex, turn.fact.needles)), "asked after it was said"
        for span, needle in zip(question.needles, turn.fact.needles, strict=True):
            assert needle in tokenizer.decode(tokens[slice(*span)])
            assert len(tokenizer.decode(tokens[slice(*span)])) <= len(needle) + 12
        assert question.distance == question.answer[0] - question.needles[0][0] > 0
    assert ("<|assistant|>" in tokenizer.decode(tokens)) is (template is not None)


@pytest.mark.parametrize("policy", [
    EvictionPolicy(n_sink=4, window_size=28),
    EvictionPolicy(n_sink=0, window_size=24, compress_every=16, cache_slack=8, max_drop=4),
])  # fmt: skip
def test_an_answer_is_all_hits_if_greedy_decoding_says_it(golden_model, golden_tokens, policy):
    """What the decoder says by itself counts as an answer; with any one token changed it does not, and neither does
    what comes after that."""
    loaded = golden_model("llama-tiny", "float64")
    decoder = make_decoder(loaded, Configuration("ours", policy))
    said = list(map(int, golden_tokens[:80]))
    with torch.inference_mode():
        for token in said:
            logits = decoder.feed(torch.tensor([token]))
        for _ in range(6):
            said.append(int(logits.argmax(-1)))
            logits = decoder.feed(torch.tensor(said[-1:]))
    forced = np.array([*said, *golden_tokens[80:100]])
    table = losses_and_hits(loaded, forced, policy)
    assert table[79:85, 2].all()
    np.testing.assert_allclose(table[:, 1], block_parallel_losses(loaded, forced, policy), atol=1e-12)
    for wrong in range(80, 86):
        other = forced.copy()
        other[wrong] = (other[wrong] + 1) % loaded.vocabulary
        assert not losses_and_hits(loaded, other, policy)[79:85, 2].all()


def test_what_counts_as_recalled():
    """By hand: S=2 and W=4, so that before query t >= 6 there are t - 6 tokens evicted."""
    policy = EvictionPolicy(n_sink=2, window_size=4)
    assert evicted_before(policy, 12)[-4:] == [2, 3, 4, 5]
    table = np.column_stack((np.arange(19), np.ones(19), np.ones(19)))
    table[11, 2] = 0  # of token 12
    spans = [((10, 12), (8, 10)), ((11, 13), (0, 2)), ((13, 15), (7, 9)), ((13, 15), (1, 3))]
    questions = tuple(Question(answer, (needle,)) for answer, needle in spans)
    asked = AskedStream("keys", TokenStream(np.zeros(20, np.int64), "x", ""), questions)
    records = answers(asked, table, policy)
    assert [record["exact"] for record in records] == [True, False, True, True]
    assert [record["cached"] for record in records] == [1.0, 1.0, 0.0, 0.5]
    assert [record["distance"] for record in records] == [2, 11, 6, 12]
    assert {record["answer_loss"] for record in records} == {2.0}
    octaves = by_octave(records)
    assert [(one["from"], one["to"], one["questions"], one["recall"]) for one in octaves] == [
        (2, 3, 1, 1.0), (4, 7, 1, 1.0), (8, 15, 2, 0.5)
    ]  # fmt: skip
    assert summary(records)["recall"] == 0.75 and summary(records)["cached"] == 0.5


def test_wilsons_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_lm_evaluation_harness_reads_the_files():
    """As far as the log-likelihoods that it asks a model for, and what it makes of them."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Model(LM):
        def loglikelihood(self, requests, **_):
            self.asked = [request.args for request in requests]
            return [(-1.5, number % 2 == 0) for number in range(len(requests))]

        loglikelihood_rolling = generate_until = None

    files = TaskManager(include_path=str(FOLDER), metadata={"distances": [64, 128], "questions": 2})
    model = Model()
    found = simple_evaluate(model, tasks=["streamllm_recall"], task_manager=files, bootstrap_iters=0)["results"]
    for name in TASKS:
        assert found[f"streamllm_{name}"]["exact_match,none"] == 0.5
        assert found[f"streamllm_{name}"]["answer_loss,none"] == 1.5
    assert found["streamllm_recall"]["exact_match,none"] == 0.5
    context, answer = model.asked[0]
    assert context.endswith(" is") and "?\nThe " in context and re.fullmatch(r" <?\d{5}>?", answer)


def test_the_command(tmp_path, capsys, monkeypatch):
    command = ["recall", "--length", "700", "--total-kv", "64", "128", "--compress-every", "1", "16", "--n-sink", "2",
               "--task", "keys", "first", "--dense", "--threads", "1"]  # fmt: skip
    output = ["--store", str(tmp_path / "store"), "--output-dir", str(tmp_path / "out")]
    assert program.main([*command, *output, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == record
    names = [policy["name"] for policy in record["policies"]]
    assert names == ["S=2 W=62 R=1", "S=2 W=62 R=16", "S=2 W=126 R=1", "S=2 W=126 R=16", "nothing evicted"]
    dense = record["policies"][-1]["tasks"]["keys"]
    assert dense["cached"] == 1 and record["policies"][0]["tasks"]["keys"]["cached"] < 1
    assert [bool(policy["after_prunes"]) for policy in record["policies"]] == [False, True, False, True, False]
    table = pd.read_csv(tmp_path / "out" / "recall.csv")
    assert len(table) == 5 * sum(task["questions"] for task in record["policies"][0]["tasks"].values())
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")

    kept = ["recall", "--length", "700", "--total-kv", "64", "--positions", "compact", "keep", "--task", "last"]
    assert program.main([*kept, *output, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)["policies"]
    assert [policy["positions"] for policy in both] == ["compact", "keep"] and "positions=keep" in both[1]["name"]
    assert both[0]["tasks"]["last"]["answer_loss"] != both[1]["tasks"]["last"]["answer_loss"]

    tokenizer, loaded = load_tokenizer("testbed"), load_model("testbed")
    asked = asked_stream("keys", 700, tokenizer)
    policy = EvictionPolicy(n_sink=2, window_size=62, compress_every=16)
    expected = summary(answers(asked, losses_and_hits(loaded, asked.stream.tokens, policy), policy))
    found = record["policies"][1]["tasks"]["keys"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)

    def nothing_runs(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "measure", nothing_runs)
    assert program.main([*command, *output]) == 0
    shown = capsys.readouterr().out
    assert "keys: a key among many" in shown and "S=2 W=126 R=16" in shown and "place up to" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", "20"), "length 20: must be >= 64"),
        (("--length", "64", "--task", "first"), "no question of task 'first' fits"),
        (("--total-kv", "64", "--window-size", "60"), "give one of the two"),
        (("--total-kv", "4"), "cap 4: below n_sink 4"),
        (("--window-size", "0"), "window_size 0: must be"),
        (("--compress-every", "-1"), "compress_every -1: must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_meant(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert program.main(["recall", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_harness_files_name_what_there_is():
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    files = {path.stem: yaml.load(path.read_text(), Loader) for path in FOLDER.glob("*.yaml")}
    assert set(files) == {*TASKS, "recall", "_recall_template"}
    assert files["recall"]["task"] == [f"streamllm_{name}" for name in TASKS]
    for name in TASKS:
        assert files[name]["task"] == f"streamllm_{name}"
        assert files[name]["custom_dataset"] == f"harness.{name}"
        documents = getattr(harness, name)(distances=[64, 128], questions=2, pretrained="any")["test"]
        assert len(documents) == 4 and len(set(documents["answer"])) == 4
        for document in documents:
            assert document["answer"] in document["text"] and document["answer"] not in document["question"]
    assert harness.process_results({}, [(-2.5, True)]) == {"exact_match": 1.0, "answer_loss": 2.5}


def test_texts_need_no_torch():
    """`--help` and the harness's task files are quick."""
    import subprocess
    import sys

    code = "import sys, streamllm.tasks.texts; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_names_and_numbers_do_not_run_out():
    pieces = TASKS["keys"].pieces(Random(0))
    facts = [fact for _, (_, fact) in zip(range(3000), pieces, strict=False)]
    assert len({fact.key for fact in facts}) == len({fact.answer for fact in facts}) == 3000
