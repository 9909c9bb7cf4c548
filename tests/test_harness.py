"""Tasks of lm-evaluation-harness: with nothing evicted its own model's numbers, under any policy ours."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # which the harness' own model imports

from streamllm.__main__ import main
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.errors import UsageError
from streamllm.harness import results, tasks
from streamllm.harness.model import Conventions, StreamingLM
from streamllm.harness.tasks import TaskOptions, Tasks
from streamllm.measuring.store import MeasurementStore
from streamllm.policy import EvictionPolicy
from streamllm.testbed import MODEL_FOLDER

from .task_files import PARTS, write_tasks

NAMES = ("choice", "rolling", "completion", "cloze")
POLICY = EvictionPolicy(n_sink=4, window_size=20, compress_every=4)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The harness' own pool would fork it, and hang in what Ray has left there for signals."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.fixture(scope="module")
def loaded():
    return load_model("testbed", "float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("testbed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    yield write_tasks(tmp_path_factory.mktemp("tasks"))
    del os.environ["HF_DATASETS_OFFLINE"]


def prepared(names, folder, tokenizer, **options):
    found = Tasks(names, TaskOptions(folder=folder, **options), tokenizer, str(MODEL_FOLDER))
    return [found.prepared(name) for name in names]


def scores_of(model, prepared_tasks):
    return results.scores(results.merged([task.run(model) for task in prepared_tasks]))


def test_with_nothing_evicted_the_numbers_are_the_harness_own(loaded, tokenizer, folder, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(tasks, "_BOOTSTRAPS", 1000)
    with tasks.quiet():
        theirs = simple_evaluate(
            HFLM(str(MODEL_FOLDER), device="cpu", dtype="float32"),
            tasks=list(NAMES),
            num_fewshot=1,
            bootstrap_iters=1000,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )
    expected = results.scores(theirs)
    assert len(expected) >= 10 and expected["completion/exact_match/first"] not in (0, 1)

    def ours(method, **options):
        what = Configuration(method, EvictionPolicy(n_sink=4, window_size=36))
        model = StreamingLM(loaded, tokenizer, what)
        return scores_of(model, prepared(NAMES, folder, tokenizer, num_fewshot=1, **options))

    assert ours("dense") == pytest.approx(expected, rel=1e-4, abs=1e-4)
    evicting, recomputing, whole = ours("ring", limit=3), ours("recompute", limit=3), ours("dense", limit=3)
    assert evicting["cloze/perplexity"] != pytest.approx(whole["cloze/perplexity"], rel=1e-4)
    assert recomputing["cloze/perplexity"] != pytest.approx(whole["cloze/perplexity"], rel=1e-4)
    assert recomputing["cloze/perplexity"] != pytest.approx(evicting["cloze/perplexity"], rel=1e-4)


def test_a_rolling_perplexity_under_a_policy_is_the_evaluators(loaded, tokenizer, folder):
    model = StreamingLM(loaded, tokenizer, Configuration("ours", POLICY))
    found = scores_of(model, prepared(["rolling"], folder, tokenizer))
    losses, size = 0.0, 0
    for part in PARTS:
        tokens = np.array([tokenizer.eos_token_id, *tokenizer(part[:250])["input_ids"]])
        losses += block_parallel_losses(loaded, tokens, POLICY).sum()
        size += len(part[:250].encode())
    assert found["rolling/bits_per_byte"] == pytest.approx(losses / size / np.log(2), rel=1e-6)


def test_what_is_longer_than_max_length_is_treated_as_the_harness_does(loaded, tokenizer, folder):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(MODEL_FOLDER), device="cpu", dtype="float32", max_length=24)
    model = StreamingLM(loaded, tokenizer, Configuration("dense", EvictionPolicy()), Conventions(max_length=24))
    with tasks.quiet():
        for one in prepared(["choice", "rolling", "completion"], folder, tokenizer, limit=2):
            for task in one.found["tasks"].values():
                kind = task.instances[0].request_type
                expected = getattr(theirs, kind)(task.instances)
                found = getattr(model, kind)(task.instances)
                assert found == expected if kind == "generate_until" else np.allclose(found, expected, atol=1e-4)


def test_what_is_stored_is_not_run_again(loaded, tokenizer, folder, tmp_path, monkeypatch):
    store, model = MeasurementStore(tmp_path), StreamingLM(loaded, tokenizer, Configuration("ours", POLICY))
    first = [results.measured(store, model, task) for task in prepared(NAMES, folder, tokenizer)]
    for name in ("_loglikelihood_tokens", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(StreamingLM, name, None)
    moved = write_tasks(tmp_path / "elsewhere")
    again = [results.measured(store, model, task) for task in prepared(NAMES, moved, tokenizer)]
    assert [one | {"reused": True} for one in first] == again
    ring = StreamingLM(loaded, tokenizer, Configuration("ring", POLICY))
    (choice, completion) = prepared(["choice", "completion"], folder, tokenizer)
    assert results.measured(store, ring, choice)["reused"], "log-likelihoods do not depend on the cache"
    assert store.get(results.key_of(ring, completion)) is None, "what is written may, by rounding"


def test_a_result_is_named_by_all_that_determines_it(loaded, tokenizer, folder, tmp_path):
    def key(what=None, at=folder, conventions=None, **options):
        what = what or Configuration("ours", POLICY)
        (task,) = prepared(["choice"], at, tokenizer, **options)
        return json.dumps(results.key_of(StreamingLM(loaded, tokenizer, what, conventions), task), sort_keys=True)

    changed = write_tasks(tmp_path / "changed")
    data = changed / "choice.jsonl"
    data.write_text(data.read_text().replace('"answer": 3', '"answer": 2', 1))
    scored_otherwise = write_tasks(tmp_path / "metric")
    file = scored_otherwise / "choice.yaml"
    file.write_text(file.read_text().replace("- metric: acc_norm\n", ""))
    keys = [
        key(),
        key(Configuration("ours", EvictionPolicy(n_sink=3, window_size=20, compress_every=4))),
        key(Configuration("recompute", POLICY)),
        key(at=changed),
        key(at=scored_otherwise),
        key(num_fewshot=2),
        key(num_fewshot=2, seeds=(0, 1, 2, 3)),
        key(limit=5),
        key(system_instruction="Answer."),
        key(conventions=Conventions(max_length=50)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_chat_template_is_applied_as_the_harness_applies_it(loaded, folder):
    from lm_eval import evaluator

    tokenizer = load_tokenizer("testbed")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    options = {"num_fewshot": 2, "apply_chat_template": True, "system_instruction": "Be brief."}
    (task,) = prepared(["cloze"], folder, tokenizer, **options)
    seen = [instance.args for one in task.found["tasks"].values() for instance in one.instances]
    assert seen[0][0].startswith("<system>Be brief.\n<user>") and seen[0][0].endswith("<a>")
    assert seen[0][0].count("<assistant>") == 2

    class Listener(StreamingLM):
        def loglikelihood(self, requests, disable_tqdm=True):
            asked.extend(request.args for request in requests)
            return [(0.0, True)] * len(requests)

    asked = []
    found = Tasks(["cloze"], TaskOptions(folder=folder), tokenizer, "").manager
    with tasks.quiet():
        evaluator.simple_evaluate(
            Listener(loaded, tokenizer, Configuration("ours", POLICY)),
            tasks=["cloze"],
            num_fewshot=2,
            apply_chat_template=True,
            system_instruction="Be brief.",
            task_manager=found,
        )
    assert asked == seen


def test_the_command_prints_the_harness_table(folder, tmp_path, capsys):
    asked = ["harness", "--tasks", "choice,completion", "--tasks-folder", str(folder), "--limit", "6"]
    asked += ["--window-size", "20", "--store", str(tmp_path / "store")]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "S=4 W=20 R=1" in shown and "24 requests" not in shown and "30 requests in" in shown
    assert "|acc_norm" in shown.replace(" ", "") and "±" in shown
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["reused"]
        and {"choice/acc", "choice/acc_stderr", "completion/exact_match/first"} <= found["scores"].keys()
    )


def test_model_arguments_are_the_knobs(monkeypatch):
    given = "pretrained=testbed,n_sink=2,window_size=30,method=ring,attn_backend=math,dtype=float32,max_length=99"
    model = StreamingLM.create_from_arg_string(given, {"batch_size": 4, "device": "cuda:0"})
    assert model.what == Configuration("ring", EvictionPolicy(n_sink=2, window_size=30), "math", quantization="none")
    assert model.conventions.max_length == 99
    for wrong, message in (
        ("n_sinks=2", "model_args n_sinks: not known"),
        ("method=rings", "method 'rings': must be one of"),
        ("n_sink=-1", "n_sink -1: must be"),
        ("max_length=1", "max_length 1: must be"),
    ):
        with pytest.raises(UsageError, match=message):
            StreamingLM.create_from_arg_string(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", ","], "tasks: none given"),
        (["--tasks", "choice", "--limit", "-1"], "limit -1.0: must be"),
        (["--tasks", "choice", "--num-fewshot", "-1"], "num_fewshot -1: must be"),
        (["--tasks", "choice", "--max-length", "0"], "max_length 0: must be"),
        (["--tasks", "completion", "--gen-kwargs", '{"num_beams": 2}'], "generation_kwargs num_beams 2: not known"),
        (["--tasks", "choice", "--method", "recompute", "--decoder", "evaluator"], "is not what it computes"),
    ],
)
def test_mistakes_are_told_in_a_line(given, message, folder, tmp_path, capsys):
    assert main(["harness", "--tasks-folder", str(folder), "--store", str(tmp_path), *given]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_name_that_no_task_has_is_told_with_those_near_it(folder, tokenizer, monkeypatch):
    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **given: manager(**given | {"include_defaults": False}))
    with pytest.raises(UsageError, match="near it are choice"):
        Tasks(["choice", "choise"], TaskOptions(folder=folder), tokenizer, "")
