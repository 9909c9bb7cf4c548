"""Studies from Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dashboards
from streamllm.errors import UsageError
from streamllm.results.schema import FIELDS

from .made_studies import BASELINE, failed, row, write_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    write_study(tmp_path, [row(0, 4.0, 1.0), row(1, 2.0, 3.0), row(2, 9.0, 9.0), failed(3)], baseline=BASELINE)
    monkeypatch.chdir(tmp_path)
    return dashboards.load_study("s")


def test_a_study_is_data_frames_with_the_schemas_names_dtypes_and_units(study):
    trials, front = study.trials, study.front
    assert list(trials["trial"]) == [0, 1, 2, 3] and list(front["trial"]) == [1, 0]
    assert [column for column in trials if column in FIELDS] == [name for name in FIELDS if name in trials]
    assert trials["n_sink"].dtype == "Int64" and trials["tpot_ms"].dtype == "Float64"
    assert trials["feasible"].dtype == "boolean" and trials["method"].dtype == "string"
    assert trials["tpot_ms"].isna().tolist() == [False, False, False, True]
    assert trials.loc[0, "tpot_ms_high"] == pytest.approx(4.4)
    assert trials.attrs["study"] == "s" and trials.attrs["units"]["n_sink"] == "tokens"
    assert study.baseline["method"].tolist() == ["recompute"] and len(study.strict) == 0
    assert front.query("ppl_increase_percent < 2")["trial"].tolist() == [0]
    with pytest.raises(UsageError, match="study 'none'"):
        dashboards.load_study("none")


def test_the_readmes_example_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import dashboards\n.*?)```", readme, re.DOTALL)
    write_study(tmp_path, [row(0, 4.0, 1.0), row(1, 2.0, 3.0)], "testbed-testbed-default", baseline=BASELINE)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "ppl_vs_strict_percent" in (printed := capsys.readouterr().out) and "tokens" in printed


def test_the_readmes_evaluation_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(from streamllm import .*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.strip().endswith("(999, 2)")


def test_importing_the_packages_is_instant_and_gives_what_they_offer():
    code = (
        "import sys, streamllm, dashboards; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules), sys.modules\n"
        "assert streamllm.EvictionPolicy(n_sink=4).kept == 256 and 'torch' not in sys.modules\n"
        "assert all(getattr(streamllm, name) for name in streamllm.__all__) and dashboards.load_study\n"
        "try: streamllm.nothing\nexcept AttributeError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "module 'streamllm' has no attribute 'nothing'\n"
