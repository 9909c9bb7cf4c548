import json

import pandas as pd
import pytest

from streamllm.text import TextError, TextSource, load_tokens


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


def test_of_pg19_the_first_book(tmp_path):
    folder = tmp_path / "pg19"
    (folder / "data").mkdir(parents=True)
    pd.DataFrame({"text": ["first book", "second book"]}).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert "".join(map(chr, tokens_of(dataset_name=str(folder)).tokens)) == "first book"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "one JSON list"), ("[1, 'a'", "not JSON"), ("[1]", "at least 2"), (json.dumps([1, 999]), "0 .. 255")],
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
