"""Texts and token ids that are none."""

import json

import pytest

from streamllm.engine.loading import load_tokenizer
from streamllm.errors import TextError
from streamllm.measuring.text import TextSource, check_text, load_tokens

from .refusals import command, dry_run, refusal, within

WORDS = b"words and more words, " * 40


def message_of(tmp_path, option, name, content, *more):
    """Of the sweep before it starts anything, and of a command."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    said = refusal(dry_run(option, name, *more, cwd=tmp_path))
    assert refusal(command("evaluate", option, name, *more, cwd=tmp_path)) == said
    return said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1" + b"0" * 30 + b", 2]", "token id 1000000000000000000000000000000, the model knows 0 .. "),
        (b"[9223372036854775808, 2]", "token id 9223372036854775808"),
        (b"[1" + b"0" * 5000 + b", 2]", "not JSON (Exceeds the limit"),
        (b"[[1, 2], [3]]", "must be one JSON list of whole numbers"),
        (b"[-1, 2, 3]", "token id -1"),
        (b"[1.5, 2]", "must be one JSON list"),
        (b"[1e400, 2]", "must be one JSON list"),
        (b"[NaN, 2]", "must be one JSON list"),
        (b'["1", "2"]', "must be one JSON list"),
        (b"[true, false]", "must be one JSON list"),
        (b"[null, null]", "must be one JSON list"),
        (b'{"ids": [1, 2]}', "must be one JSON list"),
        (b"", "not JSON"),
        (b"[]", "0 of its 0 tokens"),
        (b"[7]", "1 of its 1 tokens"),
        (b"[1, 2, 99999]", "token id 99999"),
        (b"[1, 2", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\x93NUMPY\x01\0v\0", "not UTF-8"),
        ("[1, 2]".encode("utf-16"), "not UTF-8"),
        (b"\0" * 1000, "not JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_token_ids(tmp_path, content, message):
    assert message in message_of(tmp_path, "--token-ids", "ids.json", content)


def test_token_ids_may_stand_in_a_file_of_any_name(tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf" + json.dumps(list(range(200))).encode())
    assert dry_run("--token-ids", "ids.txt", "--space", "sink", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "0 of its 0 tokens are left"),
        ("t.txt", b"\0" * 2_000_000, "it has NUL characters"),
        ("t.txt", b"a", "1 of its 1 tokens are left"),
        ("t.txt", WORDS.decode().encode("utf-16"), "not UTF-8"),
        ("t.txt", WORDS.decode().encode("utf-16-le"), "it has NUL characters"),
        ("t.txt", WORDS + b"caf\xe9", "not UTF-8"),
        ("t.txt", b"\x1f\x8b\x08\0\0\0\0\0" + WORDS, "not UTF-8"),
        ("t.txt", b"\x89PNG\r\n\x1a\n", "not UTF-8"),
        ("t.json", b"{", "not readable as .json"),
        ("t.json", b"", "no rows"),
        ("t.json", b"[]", "no rows"),
        ("t.json", b"[" * 100_000, "not readable as .json"),
        ("t.json", b'{"text": 3}', "is 3, not a string"),
        ("t.json", b'{"text": ' + b"9" * 3000 + b"}", "not a string"),
        ("t.json", b'{"text": ' + b"9" * 5000 + b"}", "not readable as .json"),
        ("t.json", b'{"text": ["' + b"x" * 3000 + b'"]}', "not a string"),
        ("t.json", b'{"text": "\\ud800"}', "it has half a character, '\\ud800'"),
        ("t.json", b'{"words": "a"}', "no column 'text'"),
        ("t.json", b"[3]", "no column 'text'"),
        ("t.json", b"null", "no column 'text'"),
        ("t.jsonl", b'{"text": "a\\u0000b"}', "it has NUL characters"),
        ("t.jsonl", WORDS.decode().encode("utf-16"), "not readable as .jsonl"),
        ("t.parquet", b"", "not readable as .parquet"),
        ("t.parquet", b"PAR1" + b"\xff" * 99 + b"PAR1", "not readable as .parquet"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_texts(tmp_path, name, content, message):
    assert message in message_of(tmp_path, "--text", name, content)


def test_no_weights_are_read_for_a_text_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("streamllm.engine.loading.load_model", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "t.txt").write_bytes(b"\xff")
    for verb in ("evaluate", "baseline", "diagnose", "profile", "recall"):
        assert "not UTF-8" in refusal(command(verb, "--text", "t.txt", cwd=tmp_path))


def test_columns_and_offsets(tmp_path):
    rows = json.dumps([{"text": "a", **{"x" * 200 + str(n): 1 for n in range(50)}}, {"y" * 3000: 1}])
    assert "no column 'text'" in message_of(tmp_path, "--text", "t.json", rows.encode())
    assert "tokens are left after offset 100000" in message_of(tmp_path, "--text", "t.txt", WORDS, "--offset", "100000")
    assert "tokens are left after offset 9" in message_of(
        tmp_path, "--token-ids", "i.json", b"[1, 2, 3]", "--offset", "9"
    )


@pytest.mark.parametrize("text", [" " * 3_000_000, "a" * 3_000_000, "\n" * 3_000_000, "é" * 1_000_000])
def test_an_enormous_line_takes_seconds(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    with within(20, mib=2048):
        check_text(TextSource(text=tmp_path / "t.txt"), lambda: load_tokenizer("testbed"), None)
        assert len(load_tokens(TextSource(text=tmp_path / "t.txt"), load_tokenizer("testbed"), 10**9).tokens) > 9


def test_of_a_long_text_the_beginning_tells_whether_it_is_long_enough(tmp_path):
    (tmp_path / "t.txt").write_bytes(WORDS * 10_000)
    tokenizer, lengths = load_tokenizer("testbed"), []

    def counting(text, **options):
        lengths.append(len(text))
        return tokenizer(text, **options)

    check_text(TextSource(text=tmp_path / "t.txt", offset=100), lambda: counting, None)
    assert max(lengths) < 20_000


def test_a_tokenizer_that_fails_is_a_line(tmp_path):
    class PanicException(BaseException):
        """As Rust's."""

    def broken(text, **_):
        raise PanicException("index out of bounds\nat line 3")

    (tmp_path / "t.txt").write_bytes(WORDS)
    with pytest.raises(TextError, match=r"the model's tokenizer fails on it \(index out of bounds\)"):
        check_text(TextSource(text=tmp_path / "t.txt"), lambda: broken, None)


def test_from_python_a_name_will_do(tmp_path):
    (tmp_path / "t.txt").write_bytes(WORDS)
    source = TextSource(text=str(tmp_path / "t.txt"))
    assert source == TextSource(text=tmp_path / "t.txt") and source.label == "t"
    assert TextSource(token_ids=str(tmp_path / "t.json")).name == "t"
    with pytest.raises(TextError, match=r"text, token_ids, dataset_name: several are given; give one of them"):
        TextSource(text="a", dataset_name="b").check()
    with pytest.raises(TextError, match=r"split 'x': is for data sets; give dataset_name, or leave split out"):
        TextSource(split="x").check()
    with pytest.raises(TextError, match=r"text 3: must be a path"):
        TextSource(text=3).check()
    with pytest.raises(TextError, match=r"offset 'x': must be a whole number"):
        TextSource(offset="x").check()
