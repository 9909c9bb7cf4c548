import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from pyarrow.parquet import ParquetFile

from streamllm.measuring.tables import _parquet_rows, text_of
from streamllm.measuring.text import TextError, TextSource, file_digest, hub_name, load_tokens


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text, verbose):
        return {"input_ids": [ord(c) for c in text]}


def tokens_of(**source):
    return load_tokens(TextSource(**source), Letters(), 256)


def text(**source):
    return "".join(map(chr, tokens_of(**source).tokens))


TITLES = [
    "Reminiscences of Pioneer Days in St. Paul by Frank Moore",
    "Dragon's blood by Henry Milner Rideout",
    "More dragon's blood by Nobody",
    "1984 by Nobody",
]
SPLITS = {"train": 3, "test": 1}
"""Split -> files."""


def hub_folder(folder, kind):
    """PG19 in the hub's layout; of each book the text is split, file and title."""
    name = folder / kind / "pg19"
    for split, count in SPLITS.items():
        for number in range(count):
            part = f"{split}-0000{number}-of-0000{count}"
            titles = TITLES if number == 0 else [f"Volume {number}, {n}" for n in range(3)]
            books = pd.DataFrame({"short_book_title": titles, "text": [f"{part} {title}" for title in titles]})
            if kind == "txt":
                (name / split).mkdir(parents=True, exist_ok=True)
                for book in books.itertuples() if number == 0 else ():
                    (name / split / f"{book.short_book_title}.txt").write_text("\ufeff" + book.text, encoding="utf-8")
                continue
            (name / "data").mkdir(parents=True, exist_ok=True)
            file = name / "data" / f"{part}.{kind}"
            if kind == "jsonl":
                books.to_json(file, orient="records", lines=True)
            else:
                books.to_parquet(file, row_group_size=1)
    return name


TOUCHED: list[str] = []
"""Files under a data set's folder that Python opened since this was last cleared."""


def remember(event, arguments):
    if event == "open" and "/pg19/" in str(arguments[0]):
        TOUCHED.append(str(arguments[0]).rpartition("/pg19/")[2])


sys.addaudithook(remember)


@pytest.mark.parametrize(
    ("kind", "files", "book"),
    [
        ("parquet", {"data/test-00000-of-00001.parquet"}, 0),
        ("jsonl", {"data/test-00000-of-00001.jsonl"}, 0),
        ("txt", {"test/1984 by Nobody.txt"}, 3),  # in the order of the file names
    ],
)
def test_of_pg19_one_book_is_touched(tmp_path, kind, files, book):
    folder = hub_folder(tmp_path, kind)
    TOUCHED.clear()
    assert text(dataset_name=str(folder)) == f"test-00000-of-00001 {TITLES[book]}"
    assert set(TOUCHED) == files
    TOUCHED.clear()
    assert text(dataset_name=str(folder), book="dragon’s BLOOD") == f"test-00000-of-00001 {TITLES[1]}"
    assert set(TOUCHED) == ({f"test/{TITLES[1]}.txt"} if kind == "txt" else files)


def test_of_parquet_only_titles_and_the_books_row_group_are_read(tmp_path, monkeypatch):
    folder, read = hub_folder(tmp_path, "parquet"), read_groups(monkeypatch)
    assert text(dataset_name=str(folder), book="1") == f"test-00000-of-00001 {TITLES[1]}"
    assert read == [(1, ["text"])]
    del read[:]
    assert text(dataset_name=str(folder), book="Pioneer days").endswith("Frank Moore")
    assert read == [*((group, ["short_book_title"]) for group in range(4)), (0, ["text"])]
    TOUCHED.clear()
    train = text(dataset_name=str(folder), split="train", book="5")  # four in the first file
    assert train == "train-00001-of-00003 Volume 1, 1"
    assert set(TOUCHED) == {f"data/train-0000{n}-of-00003.parquet" for n in (0, 1)}


def test_parquet_of_an_address_is_read_where_it_lies(tmp_path):
    """As a data set's files on the hub, whose addresses begin with hf://."""
    files = [f"file://{file}" for file in sorted(hub_folder(tmp_path, "parquet").glob("data/train-*"))]
    rows = _parquet_rows(files, "data set 'pg19'", "data set 'pg19'")
    assert text_of(rows, "volume 2, 1", "lines") == "train-00002-of-00003 Volume 2, 1"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_books_by_title_and_number(tmp_path, kind):
    folder = hub_folder(tmp_path, kind)
    assert text(dataset_name=str(folder), book="dragon's blood by henry milner rideout").endswith("Rideout")
    assert text(dataset_name=str(folder), book="MORE dragons blood").endswith(TITLES[2])
    assert text(dataset_name=str(folder), book="1984 by") == f"test-00000-of-00001 {TITLES[3]}"
    assert text(dataset_name=str(folder), book="3") == f"test-00000-of-00001 {TITLES[3]}"
    assert text(dataset_name=str(folder), book="3", split="train").startswith("train-00000-of-00003 1984")
    file = next((folder / "data").glob("test-*"))
    assert text(text=file, book="Pioneer days").endswith("Frank Moore")
    for book, message in {
        "blood": r"2 titles of data set '.*' have these words; give a number: \"Dragon's .* \(book 1\), \"More",
        "Dragns blod": "no such title in data set '.*'; near it: \"Dragon's blood by Henry Milner Rideout\", \"More",
        "zzz": "no such title in data set '[^;]*'; give a title, words of one, or a number from 0 to 3",
        "4": "book 4: data set '.*' has 4 rows; give a number from 0 to 3, or a title",
        "-1": "book -1: data set '.*' has 4 rows; give a number from 0 to 3",
    }.items():
        with pytest.raises(TextError, match=message):
            tokens_of(dataset_name=str(folder), book=book)
    with pytest.raises(TextError, match=r"split 'dev': data set '.*' has train, test; give one of these as split"):
        tokens_of(dataset_name=str(folder), split="dev")


def test_a_table_without_titles_knows_numbers_only(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "first"}\n{"text": "second"}\n{"text": 3}\n')
    assert text(text=file, book="1") == "second"
    with pytest.raises(TextError, match="'text' of row 3 is 3, not a string"):
        tokens_of(text=file, book="2")
    with pytest.raises(
        TextError, match=r"book 'second': text .* has no titles \(no column short_book_title or title\)"
    ):
        tokens_of(text=file, book="second")


def test_wikitext_joined_as_the_source_documents_did(tmp_path):
    """Rows that are not blank, as they are, with an empty line between."""
    rows = ["", " = Title = \n", "", " Words .\n", " \n", " More .\n"]
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    paragraphs = " = Title = \n\n\n Words .\n\n\n More .\n"
    assert text(dataset_name=str(tmp_path), join="paragraphs") == paragraphs
    assert text(text=tmp_path / "test-00000-of-00001.parquet", join="paragraphs") == paragraphs
    assert text(dataset_name=str(tmp_path)) == "\n".join(rows)


def test_the_source_documents_own_file(tmp_path):
    """One object, of whose values `text` alone is read."""
    file = tmp_path / "long_context_20000.json"
    about = {"short_book_title": TITLES[0], "target_tokens": 20000, "available_tokens": 59202, "split": "test"}
    file.write_text(json.dumps(about | {"text": "ST. PAUL***\n\n"}))
    assert text(text=file) == "ST. PAUL***\n\n"


def test_labels_tell_books_splits_and_joins_apart():
    data = {"dataset_name": "pg19"}
    long = "A Narrative of the Shipwreck, Captivity and Sufferings of Horace Holden and Benj. H. Nute"
    labels = [
        TextSource(**data | more).label
        for more in (
            {},
            {"book": "Dragon's blood"},
            {"book": "dragon’s Blood"},
            {"book": "3"},
            {"split": "train"},
            {"book": long},
            {"book": long + ", Part 2"},
            {"dataset_name": "wikitext", "join": "paragraphs"},
            {"max_eval_tokens": 5, "dataset_config": "x"},
        )
    ]
    assert labels[:5] == ["pg19", "pg19-dragons-blood", "pg19-dragons-blood", "pg19-3", "pg19-train"]
    assert labels[5] != labels[6] and {len(label) for label in labels[5:7]} == {52}
    assert labels[7:] == ["wikitext-paragraphs", "pg19"]


class Begins(Letters):
    """Puts two tokens before every text, and one after it."""

    def __call__(self, text, verbose):
        return {"input_ids": [1, 2, *super().__call__(text, verbose)["input_ids"], 3]}


def test_what_a_tokenizer_puts_first_stays_first_at_any_offset(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("hello world")
    words = [ord(c) for c in "world"]
    at = {offset: load_tokens(TextSource(text=file, offset=offset), Begins(), 256) for offset in (0, 6)}
    assert at[0].tokens.tolist() == [1, 2, *map(ord, "hello "), *words, 3]
    assert at[6].tokens.tolist() == [1, 2, *words, 3]
    assert at[6].bos and at[0].bos and at[0].digest != at[6].digest
    cut = load_tokens(TextSource(text=file, offset=6, max_eval_tokens=4), Begins(), 256)
    assert cut.tokens.tolist() == [1, 2, *words[:2]]
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(at[6].tokens.tolist()))
    same = load_tokens(TextSource(token_ids=ids), Begins(), 256)
    assert same.digest == at[6].digest and not same.bos
    assert load_tokens(TextSource(token_ids=ids, offset=2), Begins(), 256).tokens.tolist() == [*words, 3]
    assert not tokens_of(text=file, offset=6).bos


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
    read = read_groups(monkeypatch)
    assert text(dataset_name="pg19") == "book 0"
    assert read == [(0, ["text"])]
    assert text(dataset_name="pg19", book="70") == "book 70"
    assert read[1:] == [(70, ["text"])]


def read_groups(monkeypatch):
    """What is read of parquet files: row group, columns."""
    read = []
    original = ParquetFile.read_row_group

    def counted(self, group, columns):
        read.append((group, columns))
        return original(self, group, columns=columns)

    monkeypatch.setattr(ParquetFile, "read_row_group", counted)
    return read


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
        "from streamllm.measuring.text import TextSource, load_tokens\n"
        "try: load_tokens(TextSource(dataset_name='nobody/nothing'), lambda text, verbose: {}, 1)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("TextError data set 'nobody/nothing': ")
    assert done.stdout.endswith("give a cached hub id, a local folder or a file as text\n")
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
    with pytest.raises(TextError, match="several are given; give one of them"):
        TextSource(text=tmp_path / "a", dataset_name="pg19").check()
    with pytest.raises(TextError, match="no such file"):
        TextSource(text=tmp_path / "a").check()
    with pytest.raises(TextError, match="max_eval_tokens 1"):
        TextSource(max_eval_tokens=1).check()
    plain = tmp_path / "book.txt"
    plain.write_text("words")
    for source, message in (
        (
            {"book": "3"},
            "book '3': is for texts in rows; give dataset_name, or as text a file with .jsonl, .json, .parquet",
        ),
        ({"text": plain, "book": "a title"}, "book 'a title': is for texts in rows"),
        ({"token_ids": plain, "join": "paragraphs"}, "join 'paragraphs': is for texts in rows"),
        ({"text": plain, "split": "train"}, "split 'train': is for data sets; give dataset_name"),
        ({"dataset_name": "wikitext", "join": "words"}, "join 'words': must be one of lines, paragraphs"),
        ({"dataset_name": "pg19", "join": "paragraphs"}, "join 'paragraphs': joins many rows, and a book is one"),
        ({"dataset_name": "pg19", "book": "?!"}, r"book '\?!': must be a title"),
    ):
        with pytest.raises(TextError, match=message):
            TextSource(**source).check()
    with pytest.raises(TextError, match="local folder"):
        tokens_of(dataset_name=str(tmp_path / "nothing"))
