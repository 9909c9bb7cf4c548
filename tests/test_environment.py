import argparse
import json
import os

import pandas as pd
import pytest

from streamllm.environment import read_env_file
from streamllm.errors import UsageError
from streamllm.measuring.text import TextError, TextSource, load_tokens
from streamllm.terminal.arguments import add_model_arguments, add_policy_arguments, add_text_arguments, text_source

from .test_text import Letters


def shown(monkeypatch, *arguments, **environment):
    """Model, data set, HF_HOME and OTHER of a command in the working directory."""
    monkeypatch.setattr(os, "environ", environment)
    read_env_file()
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_text_arguments(parser)
    given = parser.parse_args(arguments)
    return given.model, text_source(given).label, os.environ.get("HF_HOME"), os.environ.get("OTHER")


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("words")
    assert shown(monkeypatch) == ("testbed", "testbed", None, None)
    (tmp_path / ".env").write_text(
        "# a comment\nexport STREAMLLM_MODEL='of file'\nSTREAMLLM_DATASET=pg19\nHF_HOME=/cache\nOTHER=not ours\n"
    )
    assert shown(monkeypatch) == ("of file", "pg19", "/cache", None)
    assert shown(monkeypatch, STREAMLLM_MODEL="env", HF_HOME="/mine") == ("env", "pg19", "/mine", None)
    assert shown(monkeypatch, "--model", "m", "--text", "book.txt", STREAMLLM_MODEL="env")[:2] == ("m", "book")
    assert shown(monkeypatch, "--dataset-name", "wikitext", STREAMLLM_DATASET="pg19")[1] == "wikitext"


def test_a_misspelt_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read_env_file()  # there is none
    (tmp_path / ".env").write_text("STREAMLLM_MODLE=x\n")
    with pytest.raises(UsageError, match=r"\.env: unknown name 'STREAMLLM_MODLE'; must be one of STREAMLLM_MODEL,"):
        read_env_file()


def test_the_source_documents_names_are_read_of_the_file(tmp_path, monkeypatch, capsys):
    """As `source .env` gives them, variables in values included; in an environment so plain a name may be anybody's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(
        "HF_HOME=/of/file\nHF_DATASETS_CACHE=$HF_HOME/datasets\nROOT=/data\nHF_HUB_CACHE=${ROOT}/hub\nMODEL_NAME=theirs\n"
        "DATASET_NAME=pg19\nN_SINK=2\nWINDOW_SIZE=1024\nPG19_SAMPLE_FILE=${NOWHERE}/x\n"
    )
    assert shown(monkeypatch, HF_HOME="/mine")[:3] == ("theirs", "pg19", "/mine")
    assert (os.environ["HF_DATASETS_CACHE"], os.environ["HF_HUB_CACHE"]) == ("/mine/datasets", "/data/hub")
    assert ".env: WINDOW_SIZE is read as STREAMLLM_WINDOW_SIZE\n" in capsys.readouterr().err
    assert policy_given() == (2, 1024) and policy_given("--window-size", "60") == (2, 60)
    assert shown(monkeypatch, STREAMLLM_MODEL="env")[0] == "env"
    (tmp_path / ".env").unlink()
    assert shown(monkeypatch, MODEL_NAME="x", WINDOW_SIZE="9")[0] == "testbed" and policy_given() == (4, None)


def policy_given(*arguments):
    parser = argparse.ArgumentParser()
    add_policy_arguments(parser)
    given = parser.parse_args(arguments)
    return given.n_sink, given.window_size


def test_a_variable_that_nobody_set_and_a_window_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HF_HUB_CACHE=${HF_HOMES}/hub\n")
    with pytest.raises(UsageError, match=r"\.env: HF_HUB_CACHE '\$\{HF_HOMES\}/hub': HF_HOMES is set neither"):
        shown(monkeypatch)
    monkeypatch.setenv("STREAMLLM_WINDOW_SIZE", "wide")
    with pytest.raises(UsageError, match="STREAMLLM_WINDOW_SIZE 'wide': must be a whole number, as --window-size"):
        policy_given()


def read(name, **source):
    return "".join(map(chr, load_tokens(TextSource(dataset_name=name, **source), Letters(), 256).tokens))


def test_data_sets_of_a_folder_come_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMLLM_DATA", str(tmp_path))
    (tmp_path / "one.txt").write_text("plain text")
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("a line", "another")))
    pd.DataFrame({"text": ["first book", "second book"]}).to_parquet(tmp_path / "pg19.parquet")
    (tmp_path / "wikitext" / "wikitext-103-v1").mkdir(parents=True)
    pd.DataFrame({"text": [" = Title = \n", " Words .\n"]}).to_parquet(
        tmp_path / "wikitext" / "wikitext-103-v1" / "test-00000-of-00001.parquet"
    )
    assert read("one") == "plain text"
    assert read("two") == "a line\nanother"
    assert read("pg19") == "first book"
    assert read("wikitext") == " = Title = \n Words .\n"
    assert read("pg19", book="1") == "second book"
    with pytest.raises(
        TextError, match=r"book '1': is for texts in rows, and data set 'one' is one plain text \(one.txt\)"
    ):
        read("one", book="1")
    with pytest.raises(TextError, match=r"split 'train': data set 'pg19' is the one file '.*pg19.parquet'"):
        read("pg19", split="train")
    monkeypatch.setenv("STREAMLLM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(TextError, match=r"STREAMLLM_DATA '.*nowhere': no such folder"):
        read("one")
