"""Conditions on rows: what each means, in Python and in the report's script, which have to agree."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dashboards.tables.conditions import ConditionError, condition

_SCRIPT = Path(__file__).parents[1] / "dashboards/page/conditions.js"
ROWS = [
    {"trial": 0, "method": "ring", "backend": "flash", "tpot_ms": 2.5, "n_sink": 4, "front": True, "feasible": True},
    {"trial": 4, "method": "ours", "backend": "math", "tpot_ms": 3.0, "n_sink": 0, "front": False, "feasible": True,
     "warning": "String theory, over budget"},
    {"trial": 7, "method": "mit", "backend": "math", "tpot_ms": None, "n_sink": 4, "front": False, "feasible": False,
     "reason": "RuntimeError: out of memory; tried (128 MiB)", "state": "failed"},
    {"trial": 12, "method": "ring", "backend": "math", "tpot_ms": -1.0, "n_sink": 8, "front": True, "feasible": True,
     "backend_requested": "flash", "task/needle/acc": 0.5, "Größe": "naïve_x"},
]  # fmt: skip
MORE = ["kl", "backend_requested"]
MET = {
    # searches
    "ring": [0, 12],
    "RING": [0, 12],
    "rin": [],
    "ring math": [12],
    "ring and tpot_ms > 0": [0],
    "ring tpot_ms > 0": [0],
    "ring and (math or flash)": [0, 12],
    "ring (math or flash)": "there is no function ring",
    "not ring": [4, 7],
    "math not ring": [4, 7],
    "math not in ('flash')": "no column 'math'",
    "feasible not ring": [4],
    "4": [4],
    "4 7": [],
    "4 or 7": [4, 7],
    "2": [],
    "'out of memory'": [7],
    '"memory out"': [],
    "'naïve_x'": [12],
    "naïve": [],
    "front": [0, 12],
    "not front": [4, 7],
    "reason": [7],
    "kl": [],
    "tpot_ms": [0, 4, 12],
    "n_sink": [0, 7, 12],
    # comparisons
    "tpot_ms < 3": [0, 12],
    "tpot_ms<=3": [0, 4, 12],
    "tpot_ms >= 2.5e0": [0, 4],
    "3 > tpot_ms": [0, 12],
    "tpot_ms == -1": [12],
    "tpot_ms = (2.5)": [0],
    "tpot_ms <> 3": [0, 12],
    "tpot_ms != 3": [0, 12],
    "not tpot_ms = 3": [0, 12],
    "method = 'ring'": [0, 12],
    'METHOD = "ring"': [0, 12],
    "method = 'Ring'": [],
    "method < 'n'": [7],
    "method = 4": [],
    "method != 4": [0, 4, 7, 12],
    "n_sink = '4'": [0, 7],
    "n_sink < ' 4.0 '": [4],
    "n_sink < 'many'": [],
    "feasible = true and front = false": [4],
    "method = 'it''s'": [],
    # MLflow's spelling
    "tags.`backend.used` = 'math' and metrics.tpot_ms < 8": [4, 12],
    "backend.requested = 'flash'": [12],
    "params.n_sink = '8'": [12],
    "`task/needle/acc` >= 0.5": [12],
    "größe is not null": [12],
    # ranges
    "n_sink in (0, 8)": [4, 12],
    "n_sink not in (0, 8)": [0, 7],
    "tpot_ms in (3, null)": [4],
    "tpot_ms not in (3, null)": [],
    "method in ('ours', 'mit')": [4, 7],
    "tpot_ms between 2 and 3": [0, 4],
    "tpot_ms not between 2 and 3 and feasible": [12],
    "reason like '%MEMORY%'": [7],
    "reason like '%(128 MiB)'": [7],
    "warning not like 's%'": [],
    "method like 'm_t'": [7],
    "method like 'm.t'": [],
    "tpot_ms like '2%'": [],
    "tpot_ms is null": [7],
    "tpot_ms is not null": [0, 4, 12],
    "tpot_ms = null": [],
    "kl is null and kl_p99 is null": "no column 'kl_p99'",
    # sums
    "tpot_ms * 2 + 1 > 5.5": [0, 4],
    "tpot_ms - 0.5 - 1 = 1": [0],
    "(tpot_ms + 1) * 2 = 7": [0],
    "2 * (tpot_ms + 1) = 7": [0],
    "n_sink / tpot_ms < 1": [4, 12],
    "tpot_ms / n_sink is null": [4, 7],
    "tpot_ms % 2 = -1": [12],
    "n_sink % 0 is null": [0, 4, 7, 12],
    "-tpot_ms > 0": [12],
    "method + 1 is null": [0, 4, 7, 12],
    # truths: what is unknown is neither true nor false
    "tpot_ms < 3 or method = 'mit'": [0, 7, 12],
    "tpot_ms < 3 and method = 'mit'": [],
    "not (tpot_ms < 3 and method = 'mit')": [0, 4, 12],
    "not not front": [0, 12],
    "front or feasible and n_sink = 0": [0, 4, 12],
    "(front or feasible) and n_sink = 0": [4],
    "null or front": [0, 12],
    "front -- only these\n and tpot_ms > 0": [0],
    # what cannot be meant
    "": "expected a column or a value, found the end",
    "backend ==": "expected a column or a value, found the end",
    "tpot_m < 3": "no column 'tpot_m'; there are backend, feasible, front, method, n_sink, tpot_ms, trial",
    "(front": "expected ), found the end",
    "front)": "expected and, or, or the end, found )",
    "front and": "expected a column or a value, found the end",
    "n_sink in 4": "expected (, found 4",
    "tpot_ms between 1": "expected and, found the end",
    "tpot_ms is 3": "expected null, found 3",
    "abs(tpot_ms) < 3": "there is no function abs",
    "method = 'ring": "a text has no end: 'ring",
    "4x": "cannot read 4x",
    "front; drop": "cannot read ; drop",
    "`tpot ms` < 3": "no column 'tpot ms'",
    "(" * 41 + "front" + ")" * 41: "more than 40 parentheses or signs within one another",
    "not " * 41 + "front": "more than 40 parentheses or signs within one another",
    "(" * 40 + "front" + ")" * 40: [0, 12],
    "front or " * 2000 + "front": [0, 12],
}
COLUMNS = list(ROWS[0])


def met(text):
    try:
        is_met = condition(text, COLUMNS, [*MORE, "warning", "reason", "state", "task/needle/acc", "Größe"])
    except ConditionError as error:
        return str(error)
    return [row["trial"] for row in ROWS if is_met(row)]


@pytest.mark.parametrize("text", MET, ids=lambda text: text[:40])
def test_what_it_means(text):
    found, wanted = met(text), MET[text]
    assert found == wanted if isinstance(wanted, list) else found.startswith(wanted)


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_report_reads_it_as_python_does(tmp_path):
    """Of every text above, and of each cut off at every place, which is seldom a condition."""
    texts = [*MET, *dict.fromkeys(text[:end] for text in MET if len(text) < 100 for end in range(len(text)))]
    more = [*MORE, "warning", "reason", "state", "task/needle/acc", "Größe"]
    (tmp_path / "asked.json").write_text(json.dumps([texts, ROWS, COLUMNS, more]))
    (tmp_path / "ask.js").write_text(
        f"""const fs = require("fs");
        const conditions = new Function(fs.readFileSync({json.dumps(str(_SCRIPT))}, "utf8") + "; return conditions")();
        const [texts, rows, columns, more] = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
        console.log(JSON.stringify(texts.map((text) => {{
          try {{
            return rows.filter(conditions.condition(text, columns, more)).map((row) => row.trial);
          }} catch (error) {{
            if (error instanceof conditions.ConditionError) return error.message;
            throw error;
          }}
        }})));"""
    )
    ran = subprocess.run(["node", "ask.js", "asked.json"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    differ = {
        text: (met(text), its) for text, its in zip(texts, json.loads(ran.stdout), strict=True) if met(text) != its
    }
    assert not differ
