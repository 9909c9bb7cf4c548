"""Option values, names and folders that cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.workers.temporary import check_temporary_folder
from streamllm.engine.methods import check_execution
from streamllm.environment import read_env_file
from streamllm.errors import UsageError, one_line, reason_of

from .refusals import command, dry_run, refusal

HUGE, LONG = "1" + "0" * 30, "x" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", HUGE), "seed 1000000000000000000000000000000: must be a whole number of at most"),
        (("--seed", str(2**32)), "seed 4294967296: must be a whole number from 0 to 4000000000"),
        (("--seed", "-1"), "seed -1: must be a whole number"),
        (("--time-budget", HUGE), "time budget '1000000000000000000000000000000': must be"),
        (("--time-budget", "9" * 400 + "h"), "time budget '999"),
        (("--time-budget", "9" * 5000 + "h"), "time budget '999"),
        (("--time-budget", "nan"), "time budget 'nan'"),
        (("--time-budget", "inf"), "time budget 'inf'"),
        (("--trial-timeout", "nan"), "trial_timeout nan"),
        (("--trial-timeout", "inf"), "trial_timeout inf"),
        (("--trial-timeout", "1e300"), "trial_timeout 1e+300"),
        (("--trial-timeout", "-1"), "trial_timeout -1"),
        (("--load-timeout", "nan"), "load_timeout nan"),
        (("--load-timeout", "inf"), "load_timeout inf"),
        (("--load-timeout", "0"), "load_timeout 0"),
        (("--trials", HUGE), "trials 1000"),
        (("--trials", "-5"), "trials -5"),
        (("--trials", "0"), "trials 0"),
        (("--workers", HUGE), "workers 1000"),
        (("--workers", "-1"), "workers -1"),
        (("--workers", "1000000"), "workers 1000000: there is room for"),
        (("--cpus-per-worker", HUGE), "cpus_per_worker 1000"),
        (("--cpus-per-worker", "100000"), "cpus per worker 100000: no node has more than"),
        (("--confirm", HUGE), "confirm 1000"),
        (("--confirm", "-1"), "confirm -1"),
        (("--cap", HUGE), "cap 1000"),
        (("--cap", "0"), "cap 0"),
        (("--offset", HUGE), "offset 1000"),
        (("--offset", "-1"), "offset -1"),
        (("--max-eval-tokens", HUGE), "max_eval_tokens 1000"),
        (("--max-eval-tokens", "-3"), "max_eval_tokens -3"),
        (("--baseline-tokens", HUGE), "baseline_tokens '1000"),
        (("--baseline-tokens", "9" * 5000), "baseline_tokens '999"),
        (("--baseline-tokens", "٣²"), "baseline_tokens '٣²'"),
        (("--max-ppl-increase", "nan"), "max-ppl-increase 'nan'"),
        (("--max-ppl-increase", "1e400"), "max-ppl-increase '1e400'"),
        (("--text", LONG), "no such file"),
        (("--text", "a/" * 3000), "no such file"),
        (("--text", "a\0b"), "--text 'a\\x00b': has a NUL character"),
        (("--text", "caf\udce9.txt"), "--text 'caf\\udce9.txt': not UTF-8"),
        (("--text", "."), "text '.': not a file, but a folder"),
        (("--text", "/dev/null"), "text '/dev/null': not a file, but a device"),
        (("--text", ""), "text '.': not a file"),
        (("--token-ids", LONG), "no such file"),
        (("--token-ids", "."), "text '.': not a file"),
        (("--model", LONG), "not a usable"),
        (("--model", "a/" * 3000), "no such folder"),
        (("--model", "./nothing"), "model './nothing': no such folder"),
        (("--model", "~/nothing"), "model '~/nothing': no such folder; leave out the quotes"),
        (("--model", "a\0b"), "--model 'a\\x00b': has a NUL character"),
        (("--model", "\udcff"), "--model '\\udcff': not UTF-8"),
        (("--model", LONG + ".gguf"), "no such file"),
        (("--model", ""), "model '': no name; give 'testbed'"),
        (("--model", "a\nb"), "model 'a\\nb'"),
        (("--space", LONG), "neither a file nor one of"),
        (("--space", "a\0"), "neither a file nor one of"),
        (("--space", "\udcff"), "neither a file nor one of"),
        (("--output", LONG), "output 'xxx"),
        (("--output", "a/" * 3000), "output 'a/a/"),
        (("--output", "/dev/null"), "output '/dev/null': not a folder"),
        (("--output", "/dev/null/a/b"), "output '/dev/null/a/b': '/dev/null' is no folder; give"),
        (("--output", "a\0b"), "--output 'a\\x00b': has a NUL character"),
        (("--output", "\udcff"), "not UTF-8"),
        (("--study", LONG), "use at most 200"),
        (("--study", "a\0b"), "--study 'a\\x00b'"),
        (("--dataset-name", "\udcff"), "not UTF-8"),
        (("--book", "\udcff"), "not UTF-8"),
        (("--book", "9" * 5000, "--text", "t.jsonl"), "book '999"),
        (("--book", "-1", "--text", "t.jsonl"), "book -1"),
        (("--space", "comprehensive", "--output", "/dev/null/a"), "'/dev/null' is no folder"),
        (("--space", "comprehensive", "--text", "t.txt", "--cpus-per-worker", HUGE), "cpus_per_worker 1000"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else None,
)
def test_option_values_that_cannot_be(tmp_path, arguments, message):
    (tmp_path / "t.jsonl").write_text('{"text": "words and words"}\n' * 100)
    (tmp_path / "t.txt").write_text("words and words " * 100)
    assert message in refusal(dry_run(*arguments, cwd=tmp_path))


def test_a_trillion_trials_are_all_of_them(tmp_path):
    (tmp_path / "ids.json").write_text(str(list(range(200))))
    done = dry_run("--trials", str(10**12), "--token-ids", "ids.json", "--space", "sink", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--threads", HUGE), "threads 1000"),
        (("evaluate", "--threads", "100000"), "threads 100000"),
        (("evaluate", "--n-sink", HUGE), "n_sink 1000"),
        (("evaluate", "--overlap", HUGE), "overlap 1000"),
        (("evaluate", "--refresh-budget", HUGE), "refresh_budget 1000"),
        (("evaluate", "--prefill-tokens", HUGE, "--protocol", "chunked"), "prefill_tokens 1000"),
        (("evaluate", "--output-file", "."), "output '.': it, or its folder, cannot be made (a folder"),
        (("evaluate", "--output-file", "/dev/null/a/b"), "'/dev/null' is no folder"),
        (("evaluate", "--output-file", LONG), "output 'xxx"),
        (("evaluate", "--per-token-losses", "x.npy/../y.npy/" + LONG + ".npy"), "output 'x.npy"),
        (("evaluate", "--store", "/dev/null"), "store '/dev/null': not a folder"),
        (("evaluate", "--store", LONG), "store 'xxx"),
        (("evaluate", "--model", "a\0b"), "NUL"),
        (("baseline", "--runs", HUGE), "runs 1000"),
        (("baseline", "--output-file", "."), "output '.': it, or its folder"),
        (
            ("diagnose", "--output-dir", "/dev/null"),
            "output '/dev/null/losses.csv': it, or its folder, cannot",
        ),
        (("diagnose", "--text", LONG), "no such file"),
        (("profile", "--intervals", HUGE), "1000"),
        (("profile", "--output-file", "/dev/null/a.json"), "output '/dev/null/a.json'"),
        (("generate", "--seed", HUGE), "seed 1000"),
        (("generate", "--max-new-tokens", HUGE), "max_new_tokens 1000"),
        (("generate", "--max-new-tokens", "2", "--temperature", "nan"), "temperature nan"),
        (("generate", "--max-new-tokens", "2", "--temperature", "inf"), "temperature inf"),
        (("generate", "--max-new-tokens", "2", "--top-p", "nan"), "top_p nan"),
        (("generate", "--max-new-tokens", "2", "--top-k", HUGE), "top_k 1000"),
        (("generate", "--max-new-tokens", "2", "--prompt", "\udcff"), "--prompt '\\udcff': not UTF-8"),
        (("generate", "--max-new-tokens", "2", "--model", LONG), "not a usable"),
        (("backends", "--head-size", HUGE), "head_size 1000"),
        (("backends", "--head-size", "1000000000"), "head_size 1000000000"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else None,
)
def test_the_commands_options(tmp_path, arguments, message):
    assert message in refusal(command(*arguments, cwd=tmp_path))


def test_an_output_nobody_may_write_to(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("mine"))
    said = refusal(dry_run("--output", "mine/a/b", cwd=tmp_path))
    assert "output 'mine/a/b': 'mine' is not to be written to" in said


ENV = "STREAMLLM_MODEL=testbed\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ENV.encode("utf-16"), ".env: not UTF-8"),
        (b"STREAMLLM_MODEL=caf\xe9\n", ".env: not UTF-8"),
        (b"STREAMLLM_MODEL=a\0b\n", ".env: has NUL characters"),
        (b"\xef\xbb\xbfSTREAMLLM_MODLE=x\n", "unknown name 'STREAMLLM_MODLE'"),
        (b"STREAMLLM_" + b"X" * 5000 + b"=1\n", "unknown name 'STREAMLLM_XXX"),
        (b"A=1\n" * 300_000, ".env: more than 256 KiB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_env_file_that_is_none(tmp_path, content, message):
    (tmp_path / ".env").write_bytes(content)
    assert message in refusal(command("backends", cwd=tmp_path))
    assert message in refusal(dry_run(cwd=tmp_path))


def test_an_env_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text(ENV)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UsageError, match=r"\.env: cannot be read \(Permission denied\)"):
        read_env_file(tmp_path / ".env")


def test_a_folder_of_that_name_is_none_and_windows_way_of_utf_8_is(tmp_path, monkeypatch):
    (tmp_path / ".env").mkdir()  # a virtual environment, often
    read_env_file(tmp_path / ".env")
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "env").write_bytes(b"\xef\xbb\xbfSTREAMLLM_MODEL=mine\r\nHF_HOME=x\r\n")
    read_env_file(tmp_path / "env")
    assert os.environ == {"STREAMLLM_MODEL": "mine", "HF_HOME": "x"}


@pytest.mark.parametrize("folder", [LONG, "/dev/null", "a/" * 3000, "nowhere"])
def test_variables_that_name_no_folder(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("STREAMLLM_DATA", folder)
    assert "STREAMLLM_DATA '" in refusal(dry_run("--dataset-name", "pg19", cwd=tmp_path))


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_for_temporary_files_that_ray_cannot_use(tmp_path, monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    long, file, missing = tmp_path / ("x" * 60), tmp_path / "file", tmp_path / "missing"
    long.mkdir()
    file.write_text("")
    monkeypatch.setenv(variable, "/tmp")
    check_temporary_folder(None)
    for folder, message in (
        (long, f"{variable} '{long}': too long a path for Ray's sockets"),
        (file, f"{variable} '{file}': not a folder"),
        (Path("/dev/null/x"), f"{variable} '/dev/null/x': '/dev/null' is no folder"),
    ):
        monkeypatch.setenv(variable, str(folder))
        for address in ("auto", "10.0.0.1:6379"):  # whose Ray has its own
            check_temporary_folder(address)
        with pytest.raises(UsageError, match=message) as caught:
            check_temporary_folder(None)
        assert "set RAY_TMPDIR=/tmp" in str(caught.value)
    monkeypatch.setenv(variable, str(long))
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert "too long a path" in refusal(dry_run("--max-eval-tokens", "300"))
    monkeypatch.setenv(variable, "/tmp/" + missing.name[:8])
    check_temporary_folder(None)  # Ray makes it


def test_an_execution_that_there_is_not():
    with pytest.raises(UsageError, match=r"execution 'x': must be one of eager, compile, cudagraph"):
        check_execution("ring", "x")


def test_what_no_workers_means_is_said():
    assert "0, one per GPU; without any, one per core" in dry_run("--help").stdout.replace("\n", " ")


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("locale", "said"),
    [(ASCII, "b?k.txt in UTF-8, which this environment turns off for Python; set PYTHONUTF8=1"),
     ({"PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"}, "error: workers 9999: there is room for")],
)  # fmt: skip
def test_letters_of_other_languages_in_a_name(locale, said, tmp_path):
    (tmp_path / "b\u00f6k.txt").write_bytes(b"a few words\n" * 40)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)} | locale
    command = [sys.executable, "-m", "orchestrator.sweep", "--text", "b\u00f6k.txt", "--workers", "9999"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and said in done.stderr.decode(), done.stderr


@pytest.mark.parametrize(
    ("text", "reason", "all_of_it"),
    [
        ("", "ValueError", "ValueError"),
        ("\n  \nThe first\nthe second", "The first", "ValueError: The first the second"),
        ("backend raised:\n\nno compiler\nat all", "backend raised: no compiler",
         "ValueError: backend raised: no compiler at all"),
        ("only this:", "only this:", "ValueError: only this:"),
        ("x\ty" + "z" * 500, "x y" + "z" * 197, "ValueError: x y" + "z" * 297),
    ],
)  # fmt: skip
def test_what_a_librarys_error_says_in_a_line(text, reason, all_of_it):
    assert reason_of(ValueError(text)) == reason
    assert one_line(ValueError(text)) == all_of_it
