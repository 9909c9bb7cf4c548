"""The same cases each time; `python -m tests.fuzz.studies --seed N --minutes M` makes others."""

from .fuzz.studies import cases, write_base

CASES = 120


def test_a_study_damaged_at_random_is_shown_or_refused_in_a_line_and_goes_on(tmp_path, capsys):
    write_base(tmp_path / "base")
    failures = [one for one in cases(18, iter(range(1, CASES + 1)), tmp_path / "base", tmp_path / "work") if one]
    assert failures == []
