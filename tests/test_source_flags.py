"""The source documents' own flags and names: taken for what they mean, or refused with what to give instead."""

import argparse
import json

import pytest

from streamllm.__main__ import main
from streamllm.commands import baseline, evaluate
from streamllm.errors import UsageError
from streamllm.terminal.arguments import add_method_argument
from streamllm.terminal.refused_flags import OF_BASELINES, OF_EVALUATIONS

from .conftest import GOLDEN

TAKEN = (
    "--model-name m --dtype float16 --dataset-name wikitext --dataset-config wikitext-103-v1 --split test "
    "--text-column text --max-eval-tokens 4096 --n-sink 4 --window-size 2044 --overlap 0 --refresh-budget 0 "
    "--refresh-policy none --compress-every 64 --max-drop 32 --cache-slack 16 --fp32-loss --streaming-mode mit "
    "--cache-backend auto --mode both --output r.json --quantization int8_weight_only"
)
REFUSED = {
    "--max-samples": "64", "--text-column": "body", "--trust-remote-code": None, "--max-length": "1024",
    "--stride": "512", "--cache-implementation": "static", "--cache-backend": "mit", "--staging-buffers": None,
    "--no-staging-buffers": None, "--no-fp32-loss": None, "--baseline-results": "b.json",
    "--fixed-baseline-dir": "results/baselines", "--flash-prefill": "1", "--flash-decode": "0", "--flash-split": None,
}  # fmt: skip


def parser_of(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser


def test_what_they_ask_for_and_is_done_here_is_taken():
    given = parser_of(evaluate).parse_args(TAKEN.split())
    assert (given.model, given.method, str(given.output_file), given.window_size) == ("m", "mit", "r.json", 2044)
    assert not {"fp32_loss", "text_column", "cache_backend"} & set(vars(given))


@pytest.mark.parametrize(("flag", "value"), REFUSED.items())
@pytest.mark.parametrize("command", [evaluate, baseline])
def test_what_is_not_done_here_is_refused_with_what_to_give_instead(command, flag, value):
    known = {one.name: one for one in (*OF_EVALUATIONS, *OF_BASELINES)}
    assert set(known) - set(REFUSED) == {"--fp32-loss", "--no-skip-existing"}
    parser = parser_of(command)
    assert flag not in parser.format_help()
    with pytest.raises(UsageError) as caught:
        parser.parse_args([flag] if value is None else [flag, value])
    said = str(caught.value)
    assert said.startswith(flag if value is None else f"{flag} '{value}'") and "\n" not in said
    assert any(word in said for word in ("leave it out", "give ", "rename"))


def test_a_baseline_is_a_method_by_their_word():
    parser = argparse.ArgumentParser()
    add_method_argument(parser, "--streaming-mode", default="ours")
    assert parser.parse_args(["--method", "baseline"]).method == "recompute"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command on the golden model; returns its exit code, the objects on stdout, and the last of stderr."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(GOLDEN / "neox-tiny"), "--dtype", "float32", "--threads", "1", "--json"]

    def run(name, *more):
        monkeypatch.setattr("sys.argv", ["streamllm", name, *model, *more])
        code = main()
        printed = capsys.readouterr()
        return code, [json.loads(line) for line in printed.out.splitlines()], printed.err.splitlines()[-1:]

    return run


IDS = ("--token-ids", str(GOLDEN / "tokens.json"), "--max-eval-tokens", "60", "--window-size", "20")


def test_refresh_by_their_flags_alone(command):
    """They name no protocol: the only one that it has."""
    code, (found,), _ = command("evaluate", "--refresh-budget", "4", "--streaming-mode", "ours", *IDS)
    assert (code, found["method"], found["protocol"], found["refresh_budget"]) == (0, "refresh", "decode-loop", 4)
    assert command("evaluate", *IDS)[1][0]["protocol"] == "fast"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refresh-policy", "middle"], "refresh_policy 'middle': tokens are put back evenly spread"),
        (["--refresh-budget", "4", "--refresh-policy", "none"], "refresh_budget 4: refresh_policy none puts nothing"),
        (["--refresh-budget", "4", "--protocol", "fast"], "protocol 'fast': method 'refresh' is measured by decode-"),
    ],
)
def test_a_refresh_that_cannot_be_meant(command, options, message):
    code, printed, (complaint,) = command("evaluate", *options, *IDS)
    assert (code, printed) == (2, []) and complaint.startswith(f"error: {message}")


def test_both_fixed_baselines_from_one_command(command, tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMLLM_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    for name in ("wikitext", "pg19"):
        (tmp_path / "data" / f"{name}.txt").write_text(f"of {name}: " + "words and more words, " * 30)
    how = ("--model", "testbed", "--n-sink", "4", "--window-size", "20", "--runs", "1", "--max-eval-tokens", "50")
    code, found, _ = command("baseline", *how, "--output-dir", "results/baselines")
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "results" / "baselines").iterdir()}
    assert code == 0 and [one["dataset"] for one in found] == ["wikitext", "pg19"]
    assert written == {f"{one['dataset']}_baseline_avg.json": {"baseline": one} for one in found}
    assert {(one["method"], one["window_size"], one["n_tokens"]) for one in found} == {("recompute", 24, 50)}
    assert found[0]["text_digest"] != found[1]["text_digest"]


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ([], [("wikitext", 4096, "d/wikitext_baseline_avg.json"), ("pg19", 20_000, "d/pg19_baseline_avg.json")]),
        (["--dataset-name", "pg19"], [("pg19", None, "d/pg19_baseline_avg.json")]),
        (["--token-ids", str(GOLDEN / "tokens.json")], [("tokens", None, "d/tokens_baseline_avg.json")]),
    ],
)
def test_which_baselines_a_folder_gets(options, files):
    found = baseline._files(parser_of(baseline).parse_args(["--output-dir", "d", *options]))
    assert [(source.label, source.max_eval_tokens, str(file)) for source, file in found.items()] == files


def test_a_file_and_a_folder_are_too_many():
    with pytest.raises(UsageError, match="output-file and output-dir: a file and a folder of files"):
        baseline._files(parser_of(baseline).parse_args(["--output-dir", "a", "--output-file", "b.json"]))
