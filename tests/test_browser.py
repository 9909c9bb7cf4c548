"""The report in a real browser, where there is one: points can be pointed at, pinned and reached, and nothing fails."""

import pytest

from dashboards.pareto import write
from dashboards.report import write_report
from dashboards.tables.table import pareto_table
from tests.browser import browser, needs_browser
from tests.test_attainment import made
from tests.test_report import BASELINE, EVIL, ROWS, failed, row, study

pytestmark = needs_browser
_TAB, _ENTER, _ESCAPE = "\ue004", "\ue007", "\ue00c"
_CENTRE = (
    "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.x+r.width/2, r.y+r.height/2]"
)
_LOADED = "document.readyState == 'complete' && document.querySelectorAll('#all tbody tr').length > 0"


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


def opened(chromium, folder, rows, theme="light"):
    chromium.theme(theme)
    chromium.open(write_report(study(folder, rows)).as_uri())
    chromium.until(f"location.href.endsWith('{folder.name}/report.html') && {_LOADED}")
    chromium.run("document.getElementById('plot').scrollIntoView()")
    return lambda name: chromium.run("return document.getElementById(arguments[0]).innerText", name)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_points_are_shown_pinned_and_reached_without_errors(chromium, tmp_path, theme):
    chromium.messages(), chromium.requests()
    text = opened(chromium, tmp_path, [*ROWS, row(4, 6.0, 2.0, method=EVIL), failed(5, EVIL)], theme)
    background = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}[theme]
    first, second = (chromium.run(_CENTRE, f"[data-trial='{trial}']") for trial in (0, 2))
    chromium.point(*first)
    assert "trial 0" in text("details") and "5.00 [4.90, 5.10]" in text("details")
    chromium.point(*first, click=True)
    chromium.point(*second)
    assert "trial 0 (pinned)" in text("details") and "trial 2" in text("details")
    chromium.press(_ESCAPE)
    assert "pinned" not in text("details")
    chromium.run("document.querySelector('[data-trial=\"0\"]').focus()")
    chromium.press(_TAB, _ENTER)
    assert "trial 1 (pinned)" in text("details")
    assert EVIL in text("all")
    assert chromium.messages() == []
    assert {address.split(":")[0] for address in chromium.requests()} <= {"file", "data", "chrome", "chrome-untrusted"}


@pytest.mark.parametrize(("theme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 28)")])
def test_a_table_scrolls_by_itself_and_is_dark_where_that_is_wanted(chromium, tmp_path, theme, paper):
    found = study(tmp_path, [*ROWS, failed(5, EVIL)])
    (page,) = write(pareto_table([found], everything=True), ["html"], tmp_path)
    chromium.theme(theme)
    chromium.open(page.as_uri())
    chromium.until(f"location.href.endsWith('{tmp_path.name}/pareto.html') && document.readyState == 'complete'")
    assert chromium.run("return getComputedStyle(document.body).backgroundColor") == paper
    intervals = chromium.run("return [...document.querySelectorAll('td span')].map(i => i.getClientRects().length)")
    assert {*intervals} == {1}, "each in one piece"
    assert chromium.run("document.body.style.width = '400px'; return document.documentElement.scrollWidth") == 1280
    wide = "const t = document.querySelector('.wide'); return [t.clientWidth, t.scrollWidth]"
    there, needed = chromium.run(wide)
    assert there <= 400 < needed


def test_a_front_is_drawn_with_its_band(chromium, tmp_path):
    found = made(tmp_path, {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"})
    chromium.theme("light")
    chromium.open(write_report(found).as_uri())
    chromium.until(f"document.title == 's' && {_LOADED} && document.querySelector('#plot .band')")
    ends = (
        "return ['.grid', '.band'].map(name => { const c = document.querySelector('#plot ' + name).getBBox(); "
        "return [c.x, c.y, c.x + c.width, c.y + c.height] })"
    )
    axes, band = chromium.run(ends)
    assert band[1:3] == pytest.approx(axes[1:3]) and band[0] >= axes[0] - 0.1 and band[3] <= axes[3] + 0.1
    middle = "return ['.half', '[data-trial=\"0\"]'].map(n => document.querySelector('#plot ' + n).getBBox())"
    half, mark = chromium.run(middle)
    assert half["x"] == pytest.approx(mark["x"] + mark["width"] / 2, abs=12), "half of them are as fast as the fastest"
    swapped = (
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))"
    )
    chromium.run(swapped, "x-axis", "ppl_vs_strict_percent")
    assert chromium.run("return document.querySelectorAll('#plot .band').length") == 0, "of one objective twice"
    chromium.run(swapped, "y-axis", "tpot_ms")
    axes, turned = chromium.run(ends)
    assert turned[1:3] == pytest.approx(axes[1:3]) and turned != band
    half, mark = chromium.run(middle.replace("0", "1"))
    assert half["x"] == pytest.approx(mark["x"] + mark["width"] / 2, abs=20), "as good as the best, which is now left"
    begins = chromium.run("return document.querySelector('#plot .half').getAttribute('d').split(/[M ]/)[1]")
    assert float(begins) == pytest.approx(half["x"], abs=0.1), "its stairs go down from there"
    assert [text for text in chromium.messages() if "SEVERE" in text] == []


def test_the_table_is_sorted_filtered_and_paged_with_ten_thousand_trials(chromium, tmp_path):
    rows = [row(n, 5.0 + n % 97 / 10, (n * 7919 % 1000) / 20 + 1.0 / (1 + n % 97)) for n in range(9_999)]
    text = opened(chromium, tmp_path, [BASELINE, *rows, failed(9_999, "RuntimeError: rare")])
    cells = "return [...document.querySelectorAll('#all tbody tr')].map(row => row.cells[0].innerText)"
    assert chromium.run(cells) == [str(n) for n in range(50)]
    assert "1 to 50 of 10000" in text("count")
    chromium.run("document.getElementById('next').click()")
    assert chromium.run(cells)[0] == "50"
    chromium.run("document.querySelector('#all th button').click()")
    assert chromium.run(cells)[0] == "9999"
    filtering = "const f = document.getElementById('filter'); f.value = 'rare'; f.dispatchEvent(new Event('input'))"
    chromium.run(filtering)
    assert chromium.run(cells) == ["9999"] and "of 1 trials" in text("count")
    chromium.run("document.getElementById('everything').click()")
    drawn = chromium.run("return document.querySelector('#plot .others').getAttribute('d').split('M').length - 1")
    front = chromium.run("return document.querySelectorAll('#plot .front').length")
    assert drawn + front == 9_999
    assert chromium.messages() == []
