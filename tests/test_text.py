import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from pyarrow.parquet import ParquetFile

from streamllm.text import TextError, TextSource, file_digest, hub_name, load_tokens


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text, verbose):
        return {"input_ids": [ord(c) for c in text]}


def tokens_of(**source):
    return load_tokens(TextSource(**source), Letters(), 256)


def test_text_file(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("hello world")
    stream = tokens_of(text=file, max_eval_tokens=5)
    assert stream.tokens.tolist() == [ord(c) for c in "hello"]
    assert stream.label == "book"
    assert stream.digest == tokens_of(text=file, max_eval_tokens=5).digest != tokens_of(text=file).digest


def test_token_ids_need_no_tokenizer(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text("[1, 2, 3]")
    assert load_tokens(TextSource(token_ids=file), None, 4).tokens.tolist() == [1, 2, 3]


def test_data_set_folder_in_the_hub_layout(tmp_path):
    folder = tmp_path / "wikitext-small"
    (folder / "data").mkdir(parents=True)
    pd.DataFrame({"text": [" = A title = \n", "", " Words .\n"]}).to_parquet(
        folder / "data" / "test-00000-of-00001.parquet"
    )
    stream = tokens_of(dataset_name=str(folder))
    assert "".join(map(chr, stream.tokens)) == " = A title = \n Words .\n"
    assert stream.label == "wikitext-small"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".JSONL", ".Parquet"])
def test_json_lines_and_parquet_files(tmp_path, suffix):
    file = tmp_path / f"lines{suffix}"
    table = pd.DataFrame({"text": ["first line", "second"], "id": [1, 2]})
    table.to_json(file, orient="records", lines=True) if suffix.lower() == ".jsonl" else table.to_parquet(file)
    stream = tokens_of(text=file)
    assert "".join(map(chr, stream.tokens)) == "first line\nsecond"
    assert stream.label == "lines"


@pytest.mark.parametrize("name", ["book.txt", "lines.jsonl", "ids.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    content = {"book.txt": "hello", "lines.jsonl": '{"text": "hello"}\n', "ids.json": "[104, 101]"}[name]
    found = []
    for mark in ("", "\ufeff"):
        file = tmp_path / mark / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(mark + content, encoding="utf-8")
        found.append(tokens_of(**{"token_ids" if name == "ids.json" else "text": file}).tokens.tolist())
    assert found[0] == found[1] and found[0][0] == ord("h")


@pytest.mark.parametrize(("value", "shown"), [("null", "None"), ("3", "3")])
def test_a_row_without_text_is_named(tmp_path, value, shown):
    file = tmp_path / "lines.jsonl"
    file.write_text(f'{{"text": {value}}}\n')
    with pytest.raises(TextError, match=f"'text' of row 1 is {shown}, not a string"):
        tokens_of(text=file)
    if value == "null":
        file.write_text('{"text": "a"}\n{"text": null}\n')
        with pytest.raises(TextError, match="row 2"):
            tokens_of(text=file)


def test_file_names_are_no_patterns(tmp_path):
    (tmp_path / "wx.jsonl").write_text('{"text": "other"}\n')
    for name in ("[w]x.jsonl", "w?.jsonl", "x::y.jsonl"):
        (tmp_path / name).write_text('{"text": "2020-01-01"}\n')
        assert "".join(map(chr, tokens_of(text=tmp_path / name).tokens)) == "2020-01-01"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a\0b", "NUL characters"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"text": "a"}\n{"te', "not readable as .jsonl"),
        ("a.json", "3", "no column 'text' among none"),
        ("a.json", '[{"title": "a", "id": 1}]', "no column 'text' among title, id"),
        ("a.parquet", "PAR1", "not readable as .parquet"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        tokens_of(text=tmp_path / name)


def test_of_a_file_of_books_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMLLM_DATA", str(tmp_path))
    books = pd.DataFrame({"text": [f"book {n}" for n in range(100)], "other": range(100)})
    books.to_parquet(tmp_path / "pg19.parquet", row_group_size=1)
    read = []
    batches = ParquetFile.iter_batches

    def counted(self, **options):
        for batch in batches(self, **options):
            read.append((batch.num_rows, batch.schema.names))
            yield batch

    monkeypatch.setattr(ParquetFile, "iter_batches", counted)
    assert "".join(map(chr, tokens_of(dataset_name="pg19").tokens)) == "book 0"
    assert read == [(1, ["text"])]


def test_the_digest_of_a_source_is_its_files(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("hello")
    before = file_digest(TextSource(text=file))
    assert before == file_digest(TextSource(token_ids=file)) and len(before) == 64
    file.write_text("hallo")
    assert file_digest(TextSource(text=file)) != before
    assert file_digest(TextSource()) and file_digest(TextSource(dataset_name="nobody/nothing")) is None


def test_offset_and_length_choose_the_part(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("hello world")
    stream = tokens_of(text=file, offset=6, max_eval_tokens=3)
    assert "".join(map(chr, stream.tokens)) == "wor"
    with pytest.raises(TextError, match="1 of its 11 tokens are left after offset 10"):
        tokens_of(text=file, offset=10)
    with pytest.raises(TextError, match="offset -1"):
        TextSource(offset=-1).check()


def test_the_source_documents_configuration_names(tmp_path):
    """`--dataset-config pg19` is what they write; the data set has no such configuration."""
    folder = tmp_path / "pg19"
    (folder / "data").mkdir(parents=True)
    pd.DataFrame({"text": ["first book"]}).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    source = TextSource(dataset_name="pg19", dataset_config="pg19")
    assert hub_name(source) == ("emozilla/pg19", None)
    assert hub_name(TextSource(dataset_name="wikitext", dataset_config="wikitext-103-v1")) == (
        "Salesforce/wikitext",
        "wikitext-103-v1",
    )
    assert hub_name(TextSource(dataset_name="wikitext", dataset_config="wikitext-2-v1"))[1] == "wikitext-2-v1"
    assert hub_name(TextSource(dataset_name=str(folder))) == (str(folder), None)


def test_offline_an_uncached_hub_id_says_what_to_give_instead():
    """In a process of its own: the hub library reads the environment when it is imported."""
    code = (
        "from streamllm.text import TextSource, load_tokens\n"
        "try: load_tokens(TextSource(dataset_name='nobody/nothing'), lambda text, verbose: {}, 1)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("TextError data set 'nobody/nothing': ")
    assert done.stdout.endswith("give a cached hub id, a local folder or --text FILE\n")
    assert done.stdout.count("\n") == 1


def test_of_pg19_the_first_book(tmp_path):
    folder = tmp_path / "pg19"
    (folder / "data").mkdir(parents=True)
    pd.DataFrame({"text": ["first book", "second book"]}).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert "".join(map(chr, tokens_of(dataset_name=str(folder)).tokens)) == "first book"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "one JSON list"),
        ("[1, 'a'", "not JSON"),
        ("[1]", "at least 2"),
        ("[1, true]", "whole numbers"),
        ("[-1, 2, 3]", "token id -1,"),
        ("[1, " + "9" * 30 + "]", "0 .. 255"),
        (json.dumps([1, 999]), "0 .. 255"),
    ],
)
def test_bad_token_ids_are_explained(tmp_path, content, message):
    file = tmp_path / "ids.json"
    file.write_text(content)
    with pytest.raises(TextError, match=message):
        tokens_of(token_ids=file)


def test_contradictions_and_missing_files_are_refused_before_reading(tmp_path):
    with pytest.raises(TextError, match="not several"):
        TextSource(text=tmp_path / "a", dataset_name="pg19").check()
    with pytest.raises(TextError, match="no such file"):
        TextSource(text=tmp_path / "a").check()
    with pytest.raises(TextError, match="max_eval_tokens 1"):
        TextSource(max_eval_tokens=1).check()
    with pytest.raises(TextError, match="local folder"):
        tokens_of(dataset_name=str(tmp_path / "nothing"))
