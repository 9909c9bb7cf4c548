"""The report in a real browser, where there is one: points can be pointed at, pinned and reached, and nothing fails."""

import pytest

from dashboards.pareto import write
from dashboards.recommendation import reproduce_command
from dashboards.report import report, write_report
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


def opened(chromium, folder, rows, theme="light", width=1280, **more):
    chromium.theme(theme)
    chromium.width(width)
    chromium.open(write_report(study(folder, rows, **more)).as_uri())
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
    cells = "return [...document.querySelectorAll('#all tbody tr')].map(row => row.querySelector('button').innerText)"
    assert chromium.run(cells) == [str(n) for n in range(50)]
    assert "1 to 50 of 10000" in text("count")
    chromium.run("document.getElementById('next').click()")
    assert chromium.run(cells)[0] == "50"
    chromium.run("document.querySelector('#all th button').click()")
    assert chromium.run(cells)[0] == "9999"
    filtered(chromium, "rare")
    assert chromium.run(cells) == ["9999"] and "of 1 trials" in text("count")
    chromium.run("document.getElementById('everything').click()")
    drawn = chromium.run("return document.querySelector('#plot .once').getAttribute('d').split('M').length - 1")
    front = chromium.run("return document.querySelectorAll('#plot .front').length")
    assert drawn + front == 9_999
    assert chromium.messages() == []


def filtered(chromium, text):
    """Types that into the box; the trials of the table."""
    filtering = (
        "const f = document.getElementById('filter'); f.value = arguments[0]; f.dispatchEvent(new Event('input'))"
    )
    chromium.run(filtering, text)
    return chromium.run("return [...document.querySelectorAll('#all td.trial button')].map((b) => +b.innerText)")


SOME = [*ROWS, row(4, 6.0, 2.0, method="ring"), failed(5, "RuntimeError: out of memory")]


def test_the_box_takes_conditions_and_says_what_is_wrong_with_one(chromium, tmp_path):
    text = opened(chromium, tmp_path, SOME)
    assert filtered(chromium, "4") == [4]
    assert filtered(chromium, "front") == [0, 1, 2]
    assert filtered(chromium, "tpot_ms < 6 and not front") == [5]
    assert filtered(chromium, "'out of memory' or ring") == [4, 5]
    assert filtered(chromium, "kl is null and device = 'CPU' and trial > 3") == [4, 5], (
        "fields that no row has are null"
    )
    assert text("problem") == ""
    assert filtered(chromium, "tpot_m < 6") == [4, 5], "the rows stay while something is typed"
    assert text("problem").startswith("no column 'tpot_m'; there are backend,")
    assert text("problem").endswith("write for example backend = 'flash' and ppl_increase_percent < 3")
    assert filtered(chromium, "") == [0, 1, 2, 3, 4, 5] and text("problem") == ""
    assert chromium.messages() == []


def test_the_python_call_gives_the_rows_that_are_shown(chromium, tmp_path):
    opened(chromium, tmp_path, SOME)
    chromium.run("document.querySelector('#all th[data-key=tpot_ms] button').click()")
    shown = filtered(chromium, 'feasible and method in ("ours", "ring")')
    assert shown == [0, 1, 4, 2, 3]
    *before, last = chromium.run("return document.getElementById('all-call').textContent").splitlines()
    names = {}
    exec("\n".join(before), names)
    assert list(eval(last, names)["trial"]) == shown
    assert list(eval(last, names)["tpot_ms"]) == [5.0, 5.5, 6.0, 8.0, 9.0]


def test_a_row_shows_its_command_its_run_and_its_files(chromium, tmp_path):
    results = study(tmp_path, SOME)
    results.files.write_tracking("https://mlflow.example", "7")
    opened(chromium, tmp_path, [*SOME[:-1], failed(5, "no")])
    cell = "const cell = document.querySelector('#all').tBodies[0].rows[4].querySelector('.sources');"
    chromium.run(f"{cell} navigator.clipboard.writeText = async (text) => {{ window.copied = text; }}")
    chromium.run(f"{cell} cell.querySelector('.copy').click()")
    assert chromium.until("window.copied") == reproduce_command(results, results.trials[4])
    address = chromium.run(f"{cell} return decodeURIComponent(cell.querySelector('a').href)")
    assert address.startswith("https://mlflow.example/#/") and address.endswith("'5711d' and tags.trial = '4'")
    chromium.run(f"{cell} cell.querySelector('.files').click()")
    told = chromium.run("return document.querySelector('#all tr.more').innerText")
    assert reproduce_command(results, results.trials[4]) in told and "--trace 4" in told
    linked = chromium.run("return document.querySelector('#all tr.more a[href$=jsonl]').href")
    assert linked == (tmp_path / "trials.jsonl").as_uri()
    marks = chromium.run("return [...document.querySelectorAll('#all td.trial')].map((cell) => cell.innerText)")
    assert marks == ["0◆", "1★", "2◆", "3", "4", "5"]
    chromium.run("document.querySelector('#front-table tr.baseline .files').click()")
    told = chromium.run("return document.querySelector('#front-table tr.more').innerText")
    assert "--method recompute" in told and "--trace baseline" in told


THREE = [
    row(n, 4.0 + n, 3.0 - n / 8, peak_kv=257 + 31 * (n % 5), ppl_vs_strict_percent=3.0 - n / 8, n_sink=2**n % 37,
        ppl_vs_strict_percent_low=2.5 - n / 8, ppl_vs_strict_percent_high=3.5 - n / 8, speedup_low=9, speedup_high=11,
        cache_slack=n, max_drop=16 * n, compress_every=2**n % 61, window_size=252 - n,
        execution=["eager", "compile"][n % 2])
    for n in range(12)
]  # fmt: skip
AGAIN = [
    {"trial": n, "rounds": 3 + n % 2, "tpot_ms": 4.0 + n, "tpot_ms_low": 3.9 + n, "tpot_ms_high": 4.1 + n,
     "front_probability": 0.9} for n in range(0, 12, 2)
]  # fmt: skip
OBJECTIVES = {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize", "peak_kv": "minimize"}


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_is_wider_than_the_page(chromium, tmp_path, width):
    """Tables scroll by themselves where the page is narrow; at 1280 pixels, three objectives need no scrolling."""
    opened(chromium, tmp_path, [BASELINE, *THREE], width=width, added=AGAIN, objectives=OBJECTIVES)
    assert chromium.run("return document.documentElement.scrollWidth <= window.innerWidth")
    cut = "return [...document.querySelectorAll('.wide')].filter((e) => e.scrollWidth > e.clientWidth).length"
    assert width < 1280 or chromium.run(cut) == 0
    sizes = chromium.run(
        "return [...document.querySelectorAll('#plot text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert min(sizes) > 12, "text of the chart is as large on a narrow page"
    hollow = "return [...document.querySelectorAll('#plot .front.hollow')].length"
    assert chromium.run(hollow) == 0
    assert chromium.run("return document.querySelector('#plot .once').getAttribute('d').split('M').length - 1") == 6


@pytest.mark.parametrize("width", [400, 1280])
def test_pictures_of_several_side_by_side_can_be_read(chromium, tmp_path, width):
    """In a narrow window they scroll by themselves: a point of their text is a pixel at least; others fit."""
    import matplotlib.figure

    paths = [tmp_path / "planes.png", tmp_path / "pareto.png"]
    for path, size in zip(paths, ((11, 4.4), (7, 5)), strict=True):
        matplotlib.figure.Figure(figsize=size, dpi=150).savefig(path)
    page = tmp_path / "report.html"
    page.write_text(report(study(tmp_path / "s", [BASELINE, *THREE], objectives=OBJECTIVES), paths))
    chromium.width(width)
    chromium.open(page.as_uri())
    chromium.until("document.images.length == 2 && [...document.images].every((image) => image.complete)")
    wide, usual = chromium.run("return [...document.images].map((image) => image.getBoundingClientRect().width)")
    assert wide >= 11 * 72 and usual <= width
    cut = chromium.run(
        "return [...document.querySelectorAll('figure .wide')].map((e) => e.scrollWidth > e.clientWidth)"
    )
    assert cut == [width < 800, False]
    assert chromium.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_labels_do_not_collide(chromium, tmp_path):
    near = [row(100 + n, 5.0 + n / 40 + n % 2 / 50, 4.0 - n / 20) for n in range(40)]
    opened(chromium, tmp_path, [BASELINE, *near])
    covered = chromium.run(
        "const boxes = [...document.querySelectorAll('#plot .label')].map((one) => one.getBoundingClientRect());"
        "const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 4 < b.bottom && b.top + 4 < a.bottom;"
        "return [boxes.length, boxes.filter((a, i) => boxes.slice(i + 1).some((b) => meet(a, b))).length]"
    )
    assert covered[0] > 5 and covered[1] == 0


def test_the_chart_reaches_as_far_as_the_intervals_do(chromium, tmp_path):
    """Of a front from -0.5 to -0.3% with intervals of 1.2, whose trials lie up to 2%, all are within."""
    quality = [*(-0.5 + n / 50 for n in range(10)), *(n / 10 for n in range(20)), 40.0]
    rows = [row(n, 9.0 - (n % 10) / 2 if n < 10 else 10.0, q, ppl_increase_percent_low=q - 0.6,
                ppl_increase_percent_high=q + 0.6) for n, q in enumerate(quality)]  # fmt: skip
    text = opened(chromium, tmp_path, [BASELINE, *rows])
    assert text("beyond") == "1 of 31 trials lie beyond the edge, at which they are marked"
    ticks = "return [...document.querySelectorAll('#plot text[text-anchor=end]')].map((one) => Number(one.textContent))"
    assert max(chromium.run(ticks)) < 3
    chromium.run("document.getElementById('y-log').click()")
    chromium.run("document.getElementById('everything').click()")
    assert text("beyond") == "" and {-0.1, 0, 0.1, 1, 10} <= set(chromium.run(ticks))
    assert "log, linear near 0" in chromium.run("return document.getElementById('plot').textContent")
    assert chromium.messages() == []
