"""The report page: complete by itself, readable, harmless whatever the user's names hold, and working in a browser that has no network."""
import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from browser import CHROMIUM, NO_BROWSER, Browser, open_page
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pcim_nb.page import notebook_to_html

HOSTILE = """</script><script>window.hacked=1</script><img src="http://example.invalid/x.png" onerror="window.hacked=1">"""
NAMES = ["DMSO", "5_HT & $x_1$ **[µM]**(http://a.b)", "<b>細胞</b>", HOSTILE]
SETUP = f"""
import numpy as np, pandas as pd, matplotlib.pyplot as plt, plotly.graph_objects as go, sys
from pcim_nb.page import *
from pcim_nb import plots
names = {NAMES!r}
rng = np.random.default_rng(0)
print('SECRET-OUT'); print('SECRET-ERR', file=sys.stderr)
42
"""
CELLS = [
    new_markdown_cell("# A small report\n\nOf nothing."),
    new_code_cell(SETUP),
    new_markdown_cell("## Summary"),
    new_code_cell("markdown('Classes: {a}; {b}; {c}.', a=names[1], b=names[2], c=names[3])\nfacts([(names[2], names[1], names[3])])\nnote(names[3], 'warning')"),
    new_markdown_cell("## Figures to read"),
    new_code_cell("figure(plots.confusion(np.eye(4, dtype=int) * 9, names), 'Confusion of ' + names[3], 'All ' + names[3] + ' right', 'confusion', read='The **diagonal**.')"),
    new_code_cell("d = pd.DataFrame([{'class': c, 'channel': h, 'share': rng.random(), 'unit': u} for c in names for h in ('DNA', 'ER') for u in range(4)])\n"
                  "figure(plots.share_bars(d), 'Shares.', 'Shares by class', 'shares')"),
    new_markdown_cell("### Plotly"),
    new_code_cell("c = pd.DataFrame([{'method': n, 'mask_size': x, 'score': x ** .5, 'low': x, 'high': 1} for n in names for x in (0, .5, 1)])\n"
                  "figure(plots.dac_curves(c), 'Curves.', 'Four curves', 'dac')\n"
                  "with folded('More ' + names[3]):\n"
                  "    figure(plots.explore_maps(rng.random((2, 2, 24, 24)), rng.normal(size=(2, 2, 24, 24)), ['DNA', names[3]], names[2:]), 'Maps.', 'Maps', 'maps')\n"
                  "go.Figure(go.Scatter(y=[1, 2]))"),
    new_markdown_cell("## Tables", metadata={"tags": ["fold"]}),
    new_code_cell("t = pd.DataFrame({'class': names, 'n': [1, 20000, 3, 4], 'effect': [1/3, np.nan, 1e-9, 2]})\ntable(t, 'Numbers of ' + names[3], 'numbers', {'n': '{:d}'})\nt"),
    new_markdown_cell("## A step that fails"),
    new_code_cell("raise ValueError('label: ' + names[3])"),
]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def notebook():
    nb = new_notebook(cells=CELLS, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    NotebookClient(nb, timeout=300, allow_errors=True, resources={"metadata": {"path": str(ROOT)}}).execute()
    return nb


@pytest.fixture(scope="module")
def page(notebook, tmp_path_factory):
    return notebook_to_html(notebook, tmp_path_factory.mktemp("page") / "bericht ü.html", "Report on " + HOSTILE)


class Elements(HTMLParser):
    "All elements of a page with their attributes, and the text of its style sheets."
    def __init__(self, text):
        super().__init__()
        self.all, self.css, self._style = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag): self._style = False

    def handle_data(self, data): self.css += data if self._style else ""

    def of(self, tag): return [a for t, a in self.all if t == tag]


@pytest.fixture(scope="module")
def elements(page): return Elements(page.read_text(encoding="utf-8"))


def outside(elements):
    "Every address that a browser would fetch from elsewhere."
    fetched = [a[k] for tag, a in elements.all for k in ("src", "srcset", "poster", "data", "action", "background", "xlink:href") if a.get(k)]
    fetched += [a["href"] for tag, a in elements.all if tag in ("link", "base") and a.get("href")]
    fetched += re.findall(r"@import\s+[^;]+|url\([^)]*\)", elements.css)
    return [u for u in fetched if not u.startswith(("data:", "#"))]


def test_the_scan_for_outside_addresses_finds_them():
    text = '<link href="https://a/x.css"><script src="//cdn/x.js"></script><style>@import "y.css";b{background:url(z.png)}</style><img src="data:,">'
    assert len(outside(Elements(text))) == 4


def test_nothing_comes_from_elsewhere(page, elements):
    assert outside(elements) == []
    assert [a["href"] for a in elements.of("a") if not a.get("href", "").startswith(("#", "data:"))] == []
    assert page.stat().st_size < 12e6
    assert len([a for a in elements.of("script") if a.get("type") != "application/json"]) == 2      # plotly's, once, and ours
    assert "require.js" not in page.read_text(encoding="utf-8").lower()


def test_no_plotly_script_without_a_plotly_figure(tmp_path):
    page = notebook_to_html(new_notebook(cells=[new_markdown_cell("# x")]), tmp_path / "x.html", "x")
    assert page.stat().st_size < 100_000


def test_every_figure_is_there_with_its_words(elements):
    assert [a["id"] for a in elements.of("figure") if "id" in a] == ["figure-confusion", "figure-shares", "figure-dac", "figure-maps", "table-numbers"]
    images = elements.of("img")
    assert [a["alt"] for a in images] == [f"All {HOSTILE} right", "Shares by class"] and all(a["loading"] == "lazy" for a in images)
    plots = [a for a in elements.of("div") if a.get("class") == "js-plot"]
    assert [a.get("aria-label") for a in plots] == ["Four curves", "Maps", None]      # the last was shown without `figure`
    ids = [a["id"] for _, a in elements.all if "id" in a]
    assert len(ids) == len(set(ids))


def test_names_stay_text(page, elements):
    assert not any(k.startswith("on") for _, a in elements.all for k in a)                # no handler got in
    assert len(elements.of("img")) == 2 and len(elements.of("title")) == 1
    assert not [a for a in elements.of("a") if "a.b" in a.get("href", "")]               # nor a Markdown link
    svg = [a["src"] for a in elements.of("img")]
    assert all("%3Cscript%3E" not in s for s in svg)


def test_code_and_streams(page, notebook, tmp_path):
    text = page.read_text(encoding="utf-8")
    for secret in ("SECRET-OUT", "SECRET-ERR", "rng.random()", "Traceback"): assert secret not in text
    with_code = notebook_to_html(notebook, tmp_path / "code.html", "x", code=True).read_text(encoding="utf-8")
    assert "<details class=\"code\"" in with_code and "default_rng" in with_code
    assert with_code.count("SECRET-OUT") == 1                                            # in the code, not as output


def test_a_failed_step_says_so_in_words(page):
    text = page.read_text(encoding="utf-8")
    box = re.search(r'<div class="note error" role="alert">.*?</div>', text, re.S)[0]
    assert "ValueError: label: &lt;/script&gt;" in box and "\x1b" not in box


def test_csv_holds_what_the_table_rounds(elements):
    link = next(a for a in elements.of("a") if a.get("download") == "numbers.csv")
    df = pd.read_csv(io.BytesIO(base64.b64decode(link["href"].split("base64,")[1])), encoding="utf-8-sig")
    assert list(df["class"]) == NAMES and df["effect"][0] == 1 / 3


def test_headings_become_contents(elements, page):
    toc = re.search(r'<nav aria-label="Contents">(.*?)</nav>', page.read_text(encoding="utf-8"), re.S)[1]
    targets = re.findall(r'href="#([^"]+)"', toc)
    assert targets == ["summary", "figures-to-read", "plotly", "tables", "a-step-that-fails"]
    assert set(targets) <= {a.get("id") for _, a in elements.all}
    folded = [a for a in elements.of("details") if a.get("class") == "section"]
    assert ["open" in a for a in folded] == [True, True, False, True]


def test_same_notebook_same_page(notebook, page, tmp_path):
    again = notebook_to_html(notebook, tmp_path / "again.html", "Report on " + HOSTILE)
    assert again.read_bytes() == page.read_bytes()


def test_path_or_notebook(notebook, page, tmp_path):
    nbformat.write(notebook, tmp_path / "n.ipynb")
    assert notebook_to_html(tmp_path / "n.ipynb", tmp_path / "n.html", "Report on " + HOSTILE).read_bytes() == page.read_bytes()


# ---- in a browser ----
browser = pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
READY = "document.documentElement.dataset.ready == 'yes'"


@browser
def test_the_browser_helper_reports_complaints_and_requests(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://example.invalid/x.png'><div style='width:3000px'>x</div><script>console.error('oh'); undefined_thing()</script>")
    seen = open_page(bad, 400, ready="document.readyState == 'complete'")
    assert seen["requests"] == ["http://example.invalid/x.png"] and seen["sideways"] > 1000
    said = "\n".join(seen["console"])
    assert "oh" in said and "undefined_thing" in said and "ERR_" in said


@browser
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(page, width, dark):
    with Browser() as b:
        seen = b.open(page, width, dark=dark, ready=READY)
        assert seen["console"] == [] and seen["requests"] == [] and seen["sideways"] == 0
        assert b.run("[...document.querySelectorAll('.js-plot')].map(d => d.dataset.drawn + d.querySelectorAll('svg.main-svg').length)") == ["yes3"] * 3
        assert b.run("[...document.images].every(i => i.naturalWidth > 50)")
        assert b.run("window.hacked") is None
        assert b.run("document.title") == "Report on " + HOSTILE
        for name in NAMES[1:]: assert b.run(f"document.querySelector('main').innerText.includes({name!r}.replace(/\\s+/g, ' '))")
        assert b.run("document.querySelector('.toc details').open") == (width >= 1100)
        ink = b.run("getComputedStyle(document.querySelector('.js-plot .xtick text')).fill")
        assert (min(map(int, re.findall(r"\d+", ink)[:3])) > 150) == dark                       # the figures follow the page


@browser
def test_reading_the_page(page):
    with Browser() as b:
        b.open(page, 1400, ready=READY)
        shown = "document.querySelector('#table-numbers').checkVisibility()"
        assert not b.run(shown)
        b.run("location.hash = '#table-numbers'")                                              # a deep link opens what is folded around it
        b.wait(shown)
        width = "document.querySelector('#figure-maps .js-plot').layout.width"
        b.run("document.querySelector('details.fold').open = true")
        b.wait(f"Math.abs({width} - document.querySelector('#figure-maps .scroll').clientWidth) < 2")
        buttons = b.run("[...new Set([...document.querySelectorAll('.modebar-btn')].map(e => e.dataset.title))]")
        assert buttons == ["Download plot", "Zoom", "Pan", "Reset axes"]                       # none that sends anything
        # another channel: other pictures
        trace = "document.querySelector('#figure-maps .js-plot').data.map(t => t.visible)"
        before = b.run(trace)
        b.run("document.querySelectorAll('#figure-maps .updatemenu-button')[1].dispatchEvent(new Event('click'))")
        b.wait(f"JSON.stringify({trace}) != {str(before).lower().replace(' ', '')!r}")
        assert sum(b.run(trace)) == sum(before) == 4
        # a table that came without a button got one
        assert b.run("document.querySelectorAll('button.csv').length") == 1
        # paper: everything open, dark ink
        b.run("dispatchEvent(new Event('beforeprint'))")
        assert b.run("document.querySelectorAll('details:not([open])').length") == 0
        b.run("dispatchEvent(new Event('afterprint'))")
        assert b.console() == [] and b.requests(page.resolve().as_uri()) == []
