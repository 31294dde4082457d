"""The report as a reader sees it, in a headless Chromium."""

from pathlib import Path

import pytest
from browser import Watched, browser
from made_scores import LOG, made_scores

from pertstate.evaluation.report import render_report


pytestmark = pytest.mark.browser

BITE = "</script><script>window.bitten=1</script><img src=x onerror='window.bitten=1'>\"'&lt;<b>%{x}\u202e\x1b[2J"


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "plain.html").write_text(render_report(made_scores(), LOG, "A run"), encoding="utf-8")
    hostile = made_scores(name=lambda of: of + BITE)
    (folder / "hostile.html").write_text(render_report(hostile, LOG, BITE), encoding="utf-8")
    return folder


def opened(chromium, path: Path, **options) -> Watched:
    watched = Watched(chromium.new_page(**options))
    watched.page.goto(path.as_uri())
    watched.page.wait_for_selector("html[data-ready=true]", timeout=30_000)
    return watched


@pytest.fixture
def seen(chromium, files):
    watched = opened(chromium, files / "plain.html")
    yield watched
    # Whatever a test did, nothing failed on the page, and the page sent no request.
    assert watched.errors == []
    assert watched.requests == [(files / "plain.html").as_uri()]
    watched.page.close()


def column(page, name: str, table: str = "#table") -> list[str]:
    heads = page.locator(f"{table} thead th").all_inner_texts()
    number = [head.strip(" ▲▼") for head in heads].index(name) + 1
    return page.locator(f"{table} tbody td:nth-child({number})").all_inner_texts()


def test_every_picture_is_drawn(seen):
    for name in ("changes", "volcano", "heat-picture", "map", "curves", "calibration"):
        assert seen.page.locator(f"#{name} svg.main-svg").count() > 0, name
    assert seen.page.locator("#averages-pictures .picture").count() == 3
    assert seen.page.locator(".missing:not(noscript *)").count() == 0
    assert "0.8000 [0.7500, 0.8500] 40 %" in seen.page.locator("tr.model").first.inner_text()
    assert seen.page.locator(".verdict").inner_text() == "better than every baseline in pearson"
    assert "the two over 5 groups is 1:" in seen.page.locator("#rank").inner_text()


def test_the_table_is_sorted_by_a_click(seen):
    assert column(seen.page, "pearson")[:4] == ["0.8", "–", "0.6", "–"]
    button = seen.page.get_by_role("button", name="pearson")
    button.click()
    assert column(seen.page, "pearson")[:2] == ["0.95", "0.94"]
    # Rows without a figure stand last in both orders.
    assert column(seen.page, "pearson")[-7:] == ["–"] * 7
    assert seen.page.locator("#table th[aria-sort=descending]").inner_text().startswith("pearson")
    button.press("Enter")
    assert column(seen.page, "pearson")[:2] == ["0.55", "0.56"] and column(seen.page, "pearson")[-7:] == ["–"] * 7
    seen.page.get_by_role("button", name="perturbation", exact=True).click()
    assert column(seen.page, "perturbation")[0] == "pert_0" and column(seen.page, "perturbation")[-1] == "pert_2"


def test_the_table_is_searched(seen):
    seen.page.fill("#search", "TYPE_1 pert_2")
    assert set(column(seen.page, "context")) == {"type_1"} and set(column(seen.page, "perturbation")) == {"pert_2"}
    assert seen.page.locator("#found").inner_text() == "5 rows"
    seen.page.select_option("#method", label="ceiling")
    assert column(seen.page, "method") == ["ceiling"]
    seen.page.fill("#search", "no training cells")
    seen.page.select_option("#method", label="all")
    assert column(seen.page, "reason") == ["it has no training cells"]
    seen.page.fill("#search", "nothing like it")
    assert seen.page.locator("#found").inner_text() == "0 rows"


def test_hover_names_the_gene(seen):
    seen.page.locator("#changes").scroll_into_view_if_needed()
    # Gene 0 is the one that perturbation 0 changes most: observed 2, predicted 1.6.
    place = seen.page.evaluate(
        """() => { const div = document.getElementById('changes'), axes = div._fullLayout, box = div.getBoundingClientRect();
        return [box.x + axes.xaxis._offset + axes.xaxis.d2p(2), box.y + axes.yaxis._offset + axes.yaxis.d2p(1.6)]; }"""
    )
    seen.page.mouse.move(*place)
    hover = seen.page.locator("#changes .hovertext")
    hover.wait_for()
    assert hover.text_content() == "gene_0observed 2.000predicted 1.600"
    assert column(seen.page, "gene", "#top")[0] == "gene_0"


def test_another_group_is_chosen(seen):
    seen.page.select_option("#context", label="type_1")
    seen.page.select_option("#perturbation", label="pert_2")
    assert seen.page.locator("#chosen").inner_text().startswith("pert_2 in type_1: pearson 0.75")
    assert column(seen.page, "gene", "#top")[0] == "gene_2"
    seen.page.fill("#search", "type_0 pert_1 model")
    seen.page.locator("#table .link").first.click()
    assert seen.page.locator("#chosen").inner_text().startswith("pert_1 in type_0: pearson 0.79")
    # Both numbers of a row of the table agree with the scores, although changes were rounded to be packed.
    top = dict(zip(column(seen.page, "gene", "#top"), column(seen.page, "observed change", "#top")))
    assert float(top["gene_1"]) == pytest.approx(2, abs=1e-3)


def test_figures_of_the_heat_map_and_of_the_curves_are_chosen(seen):
    z = "() => document.getElementById('heat-picture').data[0].z"
    assert seen.page.evaluate(z) == [[0.8, 0.79, 0.78], [0.77, 0.76, 0.75]]
    seen.page.select_option("#heat-method", label="ceiling")
    assert seen.page.evaluate(z)[0] == [0.95, 0.94, 0.93]
    seen.page.select_option("#heat-metric", label="energy")
    assert seen.page.evaluate(z)[1] == [0.13, 0.14, 0.15]
    curves = "() => document.getElementById('curves').data.map((trace) => [trace.name, trace.x, trace.y])"
    assert seen.page.evaluate(curves) == [["training", [10, 20], [2, 1]], ["validation", [10, 20], [2.5, 1.5]]]


def test_only_the_chosen_group_on_the_map(seen):
    seen.page.check("#only")
    opacity = seen.page.evaluate("() => document.getElementById('map').data.map((trace) => trace.marker.opacity)")
    assert [sum(value > 0.5 for value in kind) for kind in opacity] == [12, 12, 12]


def test_hostile_names_are_text(chromium, files):
    watched = opened(chromium, files / "hostile.html")
    assert watched.page.evaluate("() => window.bitten") is None
    assert watched.errors == [] and len(watched.requests) == 1
    assert watched.page.locator("img").count() == 0
    shown = BITE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert watched.page.locator("h1").inner_text() == shown
    assert column(watched.page, "gene", "#top")[0] == "gene_0" + shown
    assert set(column(watched.page, "context")) == {"type_0" + shown, "type_1" + shown}
    label = watched.page.locator("#heat-picture .ytick text").first
    assert label.text_content() == ("type_0" + shown)[:23] + "…"
    watched.page.close()


def test_a_phone_and_paper(chromium, files, tmp_path):
    watched = opened(chromium, files / "plain.html", viewport={"width": 360, "height": 740})
    assert watched.page.evaluate("() => document.documentElement.scrollWidth") <= 360
    assert watched.page.evaluate("() => document.getElementById('changes').clientWidth") <= 360
    watched.page.emulate_media(media="print")
    assert not watched.page.locator("#search").is_visible() and watched.page.locator("#changes").is_visible()
    watched.page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert watched.errors == []
    watched.page.close()
