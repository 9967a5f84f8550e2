"""The report of a study, opened in a real browser: what leaves the page, what a reader sees, hears, sorts and prints; its tables and figures as files."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.study.drawing import HEAT_STEPS, as_file, spread
from kdstore.study.figures import all_figures, palette_of
from kdstore.study.report import write_report
from kdstore.study.tables import all_tables
from kdstore.study.tabular import as_csv, as_latex, as_markdown

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = {
    "S, 20k": "<script>owned=1</script>",
    "S, 40k": '"><img src=x onerror="owned=1"> {{ 7 * 7 }}',
    "M, 40k": "=HYPERLINK(1)",
    "M, 80k": "\\input{/etc/passwd} $50% & #_^~\u202e",
    "L, 80k, twins": "@SUM --></style></svg><svg onload=owned=1>",
    "L, 80k": "-2+3' onclick='owned=1",
}
CONTRASTS = """() => {
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }), known = new Map();
  const rgba = (css) => {
    if (!known.has(css)) {
      pixel.clearRect(0, 0, 1, 1);
      pixel.fillStyle = css;
      pixel.fillRect(0, 0, 1, 1);
      known.set(css, [...pixel.getImageData(0, 0, 1, 1).data]);
    }
    return known.get(css);
  };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(c[i] / 255), 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c;
    }
    return [255, 255, 255];
  };
  for (const part of document.querySelectorAll("details")) part.open = true;
  const written = (e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll("body *")].filter(written).map((e) => {
    const style = getComputedStyle(e), [a, b] = [light(rgba(e.closest("svg") ? style.fill : style.color)), light(behind(e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), `${e.tagName} ${e.textContent.trim().slice(0, 40)}`];
  });
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Open pages in a headless browser; each tells what it asked for and what it logged."""
    program = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        assert "KDSTORE_BROWSER" not in os.environ, "No browser is here, and KDSTORE_BROWSER says that one must be."
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)

        def opened(path: Path, **context: Any) -> Any:
            page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}).new_page()
            page.asked, page.logged = [], []
            page.on("request", lambda request: page.asked.append(request.url))
            page.on("console", lambda message: page.logged.append(message.text))
            page.on("pageerror", lambda error: page.logged.append(str(error)))
            page.goto(path.as_uri())
            return page

        yield opened
        browser.close()


@pytest.fixture(scope="module")
def report(study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("study") / "report", study)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_asks_for_nothing_logs_nothing_and_is_legible_in_both_themes(pages: Callable[..., Any], report: Path, scheme: str) -> None:
    page = pages(report, color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {"light": "rgb(247, 246, 243)", "dark": "rgb(15, 17, 21)"}[scheme]
    shown = page.evaluate(CONTRASTS)
    assert not [found for found in shown if found[0] < 4.5]
    page.click("#theme")
    turned = page.evaluate(CONTRASTS)
    assert len(turned) == len(shown) > 500
    assert not [found for found in turned if found[0] < 4.5]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {"dark": "rgb(247, 246, 243)", "light": "rgb(15, 17, 21)"}[scheme]
    assert page.logged == []
    page.evaluate("fetch('https://example.org/').catch(() => {})")
    assert "Content Security Policy" in page.logged[0]  # and a script that asks is refused before it does
    assert page.asked == [report.as_uri()]


def test_the_verdict_comes_first_and_above_it_what_makes_it_doubtful(pages: Callable[..., Any], report: Path) -> None:
    page = pages(report)
    said = page.inner_text("main")
    places = [said.index(text) for text in ("The control permuted targets misbehaves.", "Not run: vocabulary oracle.", "96 of 100 tasks", "Not monotone.")]
    assert places == sorted(places)
    assert places[-1] < said.index("Teacher strength and student")


def test_tables_sort_by_click_and_by_key(pages: Callable[..., Any], report: Path) -> None:
    page = pages(report)
    cells = "[...document.querySelectorAll('#scores tbody tr')].map((row) => row.cells[{}].textContent)"
    before = page.evaluate(cells.format(0))
    vqa = page.locator("#scores thead th", has_text="VQA scenes")
    vqa.locator("button").click()
    assert vqa.get_attribute("aria-sort") == "descending"
    values = [float(text.split()[0]) for text in page.evaluate(cells.format(3))]
    assert values == sorted(values, reverse=True)
    assert values[0] > 90 > values[-1]
    page.keyboard.press("Enter")  # on the same title, which has the focus
    assert vqa.get_attribute("aria-sort") == "ascending"
    assert [float(text.split()[0]) for text in page.evaluate(cells.format(3))] == sorted(values)
    page.locator("#scores thead th", has_text="loss").locator("button").focus()
    page.keyboard.press("Space")
    assert page.locator("#scores [aria-sort]").count() == 1
    losses = page.evaluate(cells.format(2))
    named = [text for text in losses if text != "-"]
    assert losses == sorted(named) + ["-"] * (len(losses) - len(named))  # nothing comes last
    assert sorted(page.evaluate(cells.format(0))) == sorted(before)


def test_without_scripts_the_page_is_whole(pages: Callable[..., Any], report: Path) -> None:
    page = pages(report, java_script_enabled=False)
    assert not page.locator("#theme").is_visible()
    assert page.locator("#scores tbody tr").count() == 29
    page.locator("#scores .source").first.click()
    assert page.locator("#source-0").is_visible()


def test_behind_every_arm_are_its_files_and_commands_by_keyboard_alone(pages: Callable[..., Any], report: Path, study: dict[str, Any]) -> None:
    page = pages(report)
    page.locator("#scores .source", has_text="student of M, 80k").first.focus()
    page.keyboard.press("Enter")
    arm = next(arm for arm in study["arms"] if arm["kind"] == "student" and arm["teacher"] == "M, 80k")
    shown = page.locator("[popover]:popover-open")
    assert all(file[part] in shown.inner_text() for file in arm["files"] for part in ("path", "digest", "command"))
    assert page.evaluate("document.activeElement.textContent") == "Close"
    page.keyboard.press("Escape")
    assert not shown.count()
    assert page.evaluate("document.activeElement.textContent") == "student of M, 80k"
    assert page.locator("tbody th[scope=row]").count() == page.locator("table.sortable tbody tr").count()


def test_every_figure_says_in_words_what_is_seen_and_has_its_table(pages: Callable[..., Any], report: Path) -> None:
    page = pages(report)
    figures = page.locator("figure")
    assert figures.count() == 15
    for plot in page.locator("figure [role=img]").all():
        assert len(plot.get_attribute("aria-label")) > 60
    assert page.locator("figure svg:not([aria-hidden=true])").count() == 0
    assert page.evaluate("[...document.querySelectorAll('section:has(figure)')].every((part) => part.querySelector('table caption'))")
    label = page.locator("#strength [role=img]").first.get_attribute("aria-label")
    assert "the strongest. born-again at 24.5: 47.6" in label
    assert "M, 80k at 63.9: 53.5 [52.0, 54.9]" in label
    assert "Without a teacher: 46.0 [44.9, 47.2]" in label
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert {"banner", "navigation", "main", "contentinfo"} <= set(re.findall(r"- (\w+)", page.locator("body").aria_snapshot()))


def test_a_phone_never_scrolls_sideways(pages: Callable[..., Any], report: Path) -> None:
    page = pages(report, viewport={"width": 340, "height": 700})
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 340


def renamed(value: Any, names: dict[str, str]) -> Any:
    """Return a content with other labels, wherever they stand."""
    if isinstance(value, dict):
        return {renamed(key, names): renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [renamed(part, names) for part in value]
    return re.sub("|".join(map(re.escape, sorted(names, key=len, reverse=True))), lambda found: names[found[0]], value) if isinstance(value, str) else value


def test_hostile_names_do_no_harm_anywhere(pages: Callable[..., Any], study: dict[str, Any], tmp_path: Path) -> None:
    few = {name: part for name, part in study.items() if name not in ("curves", "prediction", "gains")}
    content = renamed(few | {"verdicts": study["verdicts"][:1]}, HOSTILE)
    for arm in content["arms"]:
        arm["scores"] = {name: score for name, score in arm["scores"].items() if "/scenes/" not in name or name.endswith("overall")}
        arm["cost"] = None
        arm["files"][0]["command"] = "</pre><script>owned=1</script>"
    path = write_report(tmp_path / "report", content)
    page = pages(path)
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.evaluate("typeof owned") == "undefined"
    assert (page.locator("script").count(), page.locator("img").count()) == (1, 0)
    assert page.logged == []
    assert page.asked == [path.as_uri()]
    shown = page.locator("#scores tbody th").all_inner_texts()
    assert all(f"student of {name}" in shown for name in HOSTILE.values() if "\u202e" not in name)
    assert not [text for text in shown if "\u202e" in text]
    for file in sorted((tmp_path / "report" / "tables").glob("*.csv")):
        cells = [cell for row in csv.reader(io.StringIO(file.read_text())) for cell in row]
        assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@") and not re.fullmatch(r"-?[\d.e-]+", cell)]
    latex = (tmp_path / "report" / "tables" / "strength.tex").read_text()
    assert r"\textbackslash{}input\{/etc/passwd\} \$50\% \& \#\_\textasciicircum{}\textasciitilde{}" in latex
    assert len({line.count("|") - line.count(r"\|") for line in (tmp_path / "report/tables/strength.md").read_text().splitlines() if line.startswith("|")}) == 1
    assert r"\<script\>" in (tmp_path / "report" / "tables" / "strength.md").read_text()


def test_half_a_study_shows_what_is_there(pages: Callable[..., Any], study: dict[str, Any], tmp_path: Path) -> None:
    empty = pages(write_report(tmp_path / "none", {"stage": "study report", "name": "begun", "finished": {"done": 0, "failed": 0, "missing": 7}}))
    assert "No verdict yet." in empty.inner_text("main")
    assert "0 of 7 tasks are done" in empty.inner_text("main")
    half = copy.deepcopy({name: study[name] for name in ("name", "headline")} | {"arms": study["arms"][6:8], "verdicts": study["verdicts"][:1]})
    for arm in half["arms"]:  # of one seed, without an interval
        arm["scores"] = {"vqa/scenes/overall": {"mean": 48.0, "low": None, "high": None, "by_seed": [48.0]}}
    half["verdicts"][0] |= {"points": [{"teacher": "S, 20k", "strength": 31.2, "score": 48.0, "low": None, "high": None}], "spearman": None, "inversions": []}
    page = pages(write_report(tmp_path / "half", half))
    assert page.logged == []
    assert page.locator("h2").all_inner_texts()[:4] == ["Teacher strength and student", "All scores", "Score and cost", "Where it comes from"]
    assert "[" not in page.inner_text("#scores table")


def test_tables_hold_every_number_with_its_interval_in_all_three_forms(study: dict[str, Any]) -> None:
    tables = all_tables(study)
    rows = list(csv.DictReader(io.StringIO(as_csv(tables["arms"]))))
    for row, arm in zip(rows, study["arms"], strict=True):
        score = arm["scores"]["vqa/scenes/overall"]
        assert row["samples"] == str(arm["samples"] or "")
        assert [float(row[f"VQA scenes{end}"]) for end in ("", " low", " high")] == [score["mean"], score["low"], score["high"]]
    assert "53.5 [52.0, 54.9]" in as_markdown(tables["strength"])
    assert r"M, 80k & clip + 1*crd & 63.9 & 53.5 {\footnotesize {[}52.0, 54.9{]}}" in as_latex(tables["strength"])
    assert "Student: scenes-XS." in as_markdown(tables["strength"])  # the same in all rows: said once
    assert "-0.0" not in as_markdown(tables["gains"])


def test_the_same_study_is_drawn_as_the_same_bytes_without_a_date(study: dict[str, Any]) -> None:
    less = study | {"curves": [], "prediction": [], "gains": [], "arms": [arm for arm in study["arms"] if "no teacher" in arm["id"]]}
    first, again = ([figure for panels in all_figures(less, palette_of(less)).values() for figure in panels] for _ in range(2))
    assert [figure.name for figure in first] == ["strength-1", "strength-2", "spectra", "agreement-1", "agreement-2"]
    for form, one, other in (("svg", first[0], again[0]), ("svg", first[3], again[3]), ("pdf", first[2], again[2])):
        found = as_file(one, form)
        assert found == as_file(other, form)
        assert not re.search(rb"CreationDate|dc:date", found)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for w, v in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_teacher_has_one_colour_that_stands_out_and_numbers_are_read_on_every_cell_of_a_heat_map(study: dict[str, Any]) -> None:
    colors = palette_of(study)
    assert list(colors.role_of) == ["S, 20k", "S, 40k", "M, 40k", "M, 80k", "L, 80k, twins", "L, 80k", "born-again"]  # by strength
    for theme in (0, 1):
        ink, surface = (colors.roles[name][theme] for name in ("ink", "surface"))
        assert min(contrast(colors.roles[role][theme], surface) for role in colors.role_of.values()) >= 3
        assert min(contrast(colors.roles[f"heat{step}"][theme], ink) for step in range(HEAT_STEPS)) >= 4.5
    assert len({colors.roles[role][0] for role in colors.role_of.values()}) == len({*colors.marker_of.values()}) == 7


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12).map(sorted), st.floats(0.5, 20))
def test_labels_are_moved_apart_in_order_and_only_where_they_meet(places: list[float], gap: float) -> None:
    moved = spread(places, gap)
    steps = [b - a for a, b in itertools.pairwise(moved)]
    assert all(step >= gap - 1e-6 for step in steps)
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)
    if all(b - a >= gap for a, b in itertools.pairwise(places)):
        assert moved == pytest.approx(places)
