"""Names of studies, which are names of folders."""

import pytest

from orchestrator.study_name import check_study_name, model_label, study_name
from streamllm.errors import UsageError


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("testbed", "testbed", "default"), "testbed-testbed-default"),
        (("my model", "l'été (1)", "mine", "64"), "my-model-l-été-1--mine-64"),
        ((".hidden", "..", "+"), "hidden-..-+"),
        (("/", "", ""), "study"),
    ],
)
def test_a_name_that_nobody_gave_is_allowed(parts, name):
    assert study_name(*parts) == name
    check_study_name(name)


def test_names_too_long_for_a_file_system_are_cut_and_stay_apart():
    one, other = study_name("é" * 300, "a"), study_name("é" * 300, "b")
    assert one != other and max(len(name.encode()) for name in (one, other)) <= 200
    check_study_name(one)


@pytest.mark.parametrize("name", ["", ".", "..", ".store", "-x", "a/b", "a b", "a\n", "x" * 201])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UsageError, match=r"study .*: use letters|bytes long; use at most 200"):
        check_study_name(name)


def test_a_folder_named_by_a_dot_has_the_name_it_has(tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert model_label(".") == model_label("../my model/") == "my model"
    assert model_label("EleutherAI/pythia-70m") == "pythia-70m"
