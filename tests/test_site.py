"The documentation site: how notebooks become pages, the check of links on planted faults, and the whole site built and opened where the extra `docs` is installed."
import functools
import http.server
import re
import runpy
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / ".ci/docs.py").exists(), reason="no .ci folder in this copy")


@pytest.fixture(scope="module")
def docs():
    pytest.importorskip("latex2mathml", reason="the documentation's packages are not installed: install .[docs]")
    return runpy.run_path(str(ROOT / ".ci/docs.py"))


def test_prose(docs):
    text = docs["prose"]("Look:\n- one\n- two\n\n[masks](../13_masking.ipynb#When-wrong) and `x$y$z` and $a_i$.\n\n```\n- $b$\n```\n")
    assert "Look:\n\n- one\n- two" in text and "](../13_masking.md#when-wrong)" in text and "`x$y$z`" in text and "```\n- $b$\n```" in text
    assert "<math" in text and "<msub><mi>a</mi><mi>i</mi></msub>" in re.sub(r"</?mrow>", "", text)
    assert docs["prose"]("it costs 5$ and 6$") == "it costs 5$ and 6$"


def test_a_notebook_becomes_a_page(docs, tmp_path, monkeypatch):
    cell = nbformat.v4.new_code_cell
    stream = lambda text: nbformat.v4.new_output("stream", name="stdout", text=text)
    plot = nbformat.v4.new_output("display_data", data={"application/vnd.plotly.v1+json": {"data": [{"text": "</script>"}], "layout": {}}})
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# one\n\n> Why."), cell("#| default_exp one"), cell("#| export\ndef f(x):\n    return x\n\n_hidden = 1"), cell("#| hide\nsecret()"),
                                         cell("print('<b>')", outputs=[stream("<b>\n" + "x\n" * 100)]), cell("show()", outputs=[plot]), cell("answer", metadata={"tags": ["solution"]}, outputs=[stream("42")])])
    (tmp_path / "tutorials").mkdir()
    nbformat.write(nb, tmp_path / "tutorials/one.ipynb")
    for name in ("NBS", "STAGE"): monkeypatch.setitem(docs["page"].__globals__, name, tmp_path)
    text, title, pictures = docs["page"](tmp_path / "tutorials/one.ipynb")
    assert title == "one" and docs["lead"](text) == "Why." and pictures == []
    assert "secret" not in text and "#|" not in text and "source: <code>f</code>" in text and "../api/one.md" in text
    assert "&lt;b&gt;" in text and "41 more lines" in text and "\\u003c/script>" in text
    assert re.search(r'<details class="success" markdown="1"><summary>A solution</summary>.*answer.*42.*</details>', text, re.S)


def test_every_notebook_has_a_place(docs):
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")): assert any(re.match(rf"{p}\d*_", path.name) for _, p in docs["LEVELS"]), path.name


def test_faults_in_links_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    good = '<h1 id="top">x</h1><a href="sub/b.html#there">b</a><a href="#top">up</a><a href="https://a.example/x">out</a><img src="data:image/png;base64,x">'
    (tmp_path / "sub/b.html").write_text('<p id="there"><a href="../index.html">home</a><a href="..">up</a>')
    (tmp_path / "index.html").write_text(good)
    run = lambda: subprocess.run([sys.executable, str(ROOT / ".ci/links.py"), str(tmp_path)], capture_output=True, text=True)
    assert run().returncode == 0 and "2 pages" in run().stdout
    for fault, why in (('<a href="gone.html">', "leads to no file"), ('<a href="sub/b.html#nowhere">', "no such place"), ('<a href="#nowhere">', "no such place"), ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js from another host"),
                       ('<a href="http:/broken">', "is no address"), ('<img src="x.png">', "leads to no file"), ('<p id="top">', "two elements"), ('<a href="../../etc/passwd">', "leads ")):
        (tmp_path / "index.html").write_text(good + fault)
        assert run().returncode == 1 and why in run().stdout, fault


@pytest.mark.skipif(any(find_spec(m) is None for m in ("mkdocs", "material", "mkdocstrings", "latex2mathml")), reason="the documentation's packages are not installed: install .[docs]")
def test_the_whole_site(monkeypatch):
    import browser
    for script in (["docs.py"], ["links.py", "site"]):
        run = subprocess.run([sys.executable, str(ROOT / ".ci" / script[0]), *script[1:]], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    if browser.CHROMIUM is None: return
    monkeypatch.setattr(browser, "_FLAGS", [f for f in browser._FLAGS if not f.startswith("--proxy-bypass")] + ["--proxy-bypass-list=127.0.0.1"])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=ROOT / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        with browser.Browser() as b:
            for name in ("index", "gallery", "13_masking", "11_pcim", "api/masking", "benchmarks/index"):
                for width in (400, 1400):
                    seen = b.open(f"{url}{name}.html", width)
                    assert seen["console"] == [] and [u for u in seen["requests"] if not u.startswith(url)] == [] and seen["sideways"] == 0, (name, width)
                    assert b.run("[...document.images].every(i => i.naturalWidth > 10)")
    finally: server.shutdown()
