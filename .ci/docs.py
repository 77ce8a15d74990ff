"""The documentation site in site/, from the notebooks as they are: `python .ci/docs.py` (or .ci/site, which also checks all links).

Notebooks become Markdown pages with the outputs that they hold (nothing is run), exported code is folded away and leads to the API pages, which are made from the modules. Formulas become
MathML and moving figures use a local plotly.js, so that no page asks anything of another host. Needs the extra `docs`."""
import ast
import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, STAGE, SITE = ROOT / "nbs", ROOT / "build/docs", ROOT / "site"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LEVELS = [("Data", "0[0-2]"), ("Classifiers", "03"), ("Attribution", "1[01]"), ("Counterfactuals, masks, weak supervision", "1[2-9]"), ("Measures", "2[0]"), ("Features", "21"), ("Linking", "2[2-9]"),
          ("Figures and pages", "3[0-2]"), ("Reports", "3[3-9]"), ("Explorer", "4")]


# ---- text ----
def outside_code(text: str, change) -> str:
    "`change` applied to what is neither in a code block nor in backticks."
    parts = re.split(r"(```.*?```|``[^`]+``|`[^`\n]+`)", text, flags=re.S)
    return "".join(p if k % 2 else change(p) for k, p in enumerate(parts))


def formulas(text: str) -> str:
    "TeX between dollars as MathML."
    from latex2mathml.converter import convert
    block = lambda m: "\n\n" + convert(m[1].strip(), display="block") + "\n\n"
    text = re.sub(r"\$\$(.+?)\$\$", block, text, flags=re.S)
    return re.sub(r"(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", lambda m: convert(m[1]), text)


def lists(text: str) -> str:
    "A blank line before lists and tables, which Python's Markdown wants and Jupyter's does not."
    out: list[str] = []
    item = re.compile(r"\s*([-*+]|\d+[.)])\s+")
    for line in text.split("\n"):
        if out and out[-1].strip():
            if item.match(line) and not item.match(out[-1]) and not out[-1].startswith((" ", ">", "|")): out.append("")
            elif line.startswith("|") and not out[-1].startswith("|"): out.append("")
        out.append(line)
    return "\n".join(out)


def links(text: str) -> str:
    "Links to notebooks lead to their pages."
    return re.sub(r"(\]\([^)\s]+)\.ipynb(#[^)\s]*)?\)", lambda m: f"{m[1]}.md{(m[2] or '').lower()})", text)


def prose(text: str) -> str:
    whole = re.split(r"(```.*?```)", text, flags=re.S)
    return "".join(p if k % 2 else outside_code(lists(links(p)), formulas) for k, p in enumerate(whole))


def raw(inner: str, tag: str = "div", cls: str = "nb-out") -> str:
    "HTML that Markdown leaves alone: no blank line, nothing before it."
    return f"\n\n<{tag} class=\"{cls}\">" + re.sub(r"\n\s*\n+", "\n", inner).strip() + f"</{tag}>\n\n"


def fence(text: str, language: str) -> str:
    ticks = "`" * max(3, max(map(len, re.findall(r"`+", text)), default=0) + 1)
    return f"\n\n{ticks}{language}\n{text.rstrip()}\n{ticks}\n\n"


# ---- a notebook ----
def defined(source: str) -> list[str]:
    "Public names that a cell defines."
    body = ast.parse(source).body
    names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))] + [t.id for n in body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)]
    return [n for n in names if not n.startswith("_")]


def output(o, pictures: Path, name: str, alt: str, up: str) -> str:
    "One output as Markdown; pictures are written to `pictures`."
    if o.output_type == "stream":
        lines = ANSI.sub("", o.text).rstrip().splitlines()
        shown = lines[:60] + ([f"… {len(lines) - 60} more lines"] if len(lines) > 60 else [])
        return raw(f"<pre><code>{html.escape(chr(10).join(shown))}</code></pre>") if o.name == "stdout" and lines else ""
    data = o.get("data", {})
    if "application/vnd.plotly.v1+json" in data:
        spec = json.dumps({k: v for k, v in data["application/vnd.plotly.v1+json"].items() if k in ("data", "layout")}, separators=(",", ":")).replace("<", "\\u003c")
        height = (data["application/vnd.plotly.v1+json"].get("layout") or {}).get("height") or 440
        return raw(f'<div class="js-plot" style="min-height:{int(height)}px" role="img" aria-label="{html.escape(alt)}"><script type="application/json">{spec}</script></div>')
    for kind, ext in (("image/svg+xml", "svg"), ("image/png", "png"), ("image/jpeg", "jpg")):
        if kind in data:
            pictures.mkdir(parents=True, exist_ok=True)
            content = data[kind]
            (pictures / f"{name}.{ext}").write_bytes(content.encode() if ext == "svg" else base64.b64decode(content))
            return raw(f'<img src="{up}pictures/{name}.{ext}" alt="{html.escape(alt)}" loading="lazy">')
    if "text/markdown" in data: return "\n\n" + prose(data["text/markdown"]) + "\n\n"
    if "text/html" in data: return raw(re.sub(r"<style.*?</style>|<script.*?</script>", "", data["text/html"], flags=re.S).replace(' border="1"', ""))
    return raw(f"<pre><code>{html.escape(ANSI.sub('', data.get('text/plain', '')))}</code></pre>") if data.get("text/plain") and not data["text/plain"].startswith("<Figure") else ""


def page(path: Path) -> tuple[str, str, list[str]]:
    "A notebook as Markdown, its title, and the files of its pictures."
    nb = nbformat.read(path, as_version=4)
    here = path.relative_to(NBS).with_suffix("")
    up, slug, module, heading, out, made = "../" * (len(here.parts) - 1), "-".join(here.parts), None, path.stem, [], []
    for k, c in enumerate(nb.cells):
        source, solution = c.source, "solution" in c.metadata.get("tags", [])
        if exp := re.search(r"^#\| default_exp (\S+)", source, re.M): module = exp[1]
        if re.search(r"^#\| (hide|default_exp)", source, re.M): continue
        if c.cell_type == "markdown":
            if found := re.findall(r"^#+ +(.+)$", source, re.M): heading = found[-1]
            text = prose(source)
            out.append(f"\n\n<details class=\"success\" markdown=\"1\"><summary>A solution</summary>\n\n{text}\n\n</details>\n\n" if solution else text + "\n\n")
            continue
        if c.cell_type != "code": continue
        exported = re.search(r"^#\| exporti?\b", source, re.M)
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        alt = re.sub(r"[*`]", "", heading)
        shown = ""
        for j, o in enumerate(c.get("outputs", [])):
            before = sorted(STAGE.glob(f"pictures/{slug}-{k}-{j}.*"))
            shown += output(o, STAGE / "pictures", f"{slug}-{k}-{j}", alt, up)
            made += [p.name for p in sorted(STAGE.glob(f"pictures/{slug}-{k}-{j}.*")) if p not in before]
        block = fence(code, "python") if code else ""
        if exported and module:
            names = defined(code)
            what = ", ".join(f"<code>{n}</code>" for n in names) or "imports"
            api = f"\n\n[{module} in the API reference]({up}api/{module}.md)\n\n" if names else ""
            block = f"\n\n<details class=\"source\" markdown=\"1\"><summary>source: {what}</summary>\n{api}{block}</details>\n\n" if code else ""
        out.append(f"\n\n<details class=\"success\" markdown=\"1\"><summary>A solution</summary>\n{block}{shown}\n</details>\n\n" if solution else block + shown)
    text = re.sub(r"\n{3,}", "\n\n", "".join(out))
    title = re.search(r"^# +(.+)$", text, re.M)
    if not title: raise SystemExit(f"{path.relative_to(ROOT)}: no heading of the first level")
    plain = title[1].strip()
    return text, plain, made


def lead(text: str) -> str:
    "The line of why under a page's title."
    found = re.search(r"^> +(.+)$", text, re.M)
    return found[1].strip() if found else ""


# ---- the whole ----
def write(path: str, text: str) -> None:
    (STAGE / path).parent.mkdir(parents=True, exist_ok=True)
    (STAGE / path).write_text(text, encoding="utf-8")


def stage() -> list:
    "Writes all pages to build/docs and returns the navigation."
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    pages: dict[str, tuple[str, str, list[str]]] = {}
    for path in sorted(p for pattern in ("*.ipynb", "tutorials/*.ipynb", "benchmarks/*.ipynb", "howto/*.ipynb") for p in NBS.glob(pattern)):
        name = path.relative_to(NBS).with_suffix(".md").as_posix()
        pages[name] = page(path)
    for path in sorted(NBS.glob("howto/*.md")):
        text = prose(path.read_text(encoding="utf-8"))
        pages[path.relative_to(NBS).as_posix()] = (text, re.search(r"^# +(.+)$", text, re.M)[1], [])
    contributing = prose((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    pages["contributing.md"] = (contributing, "Contributing", [])
    modules = {m[1]: f"{p.stem}.md" for p in sorted(NBS.glob("*.ipynb")) if (m := re.search(r"#\| default_exp (\w+)", p.read_text(encoding="utf-8")))}
    for m, notebook in modules.items(): pages[f"api/{m}.md"] = (api(m, notebook), m, [])
    index = "# API reference\n\nEvery public function and class, with types. The page of each module begins with the notebook that it is made from.\n\n| module | what it is for |\n|---|---|\n"
    index += "".join(f"| [`pcim_nb.{m}`]({m}.md) | {lead(pages[nb][0])} |\n" for m, nb in modules.items())
    pages["api/index.md"] = (index, "API reference", [])
    pages["gallery.md"] = (gallery(pages), "Gallery", [])
    pages["benchmarks/index.md"] = (benchmarks(pages), "What is promised, and measured", [])
    for name, (text, _, _) in pages.items(): write(name, text)
    for f in ("site.css", "site.js"): shutil.copy(ROOT / ".ci" / f, STAGE / f)
    moving = any("class=\"js-plot\"" in t for t, _, _ in pages.values())
    if moving:
        import plotly
        shutil.copy(Path(plotly.__file__).parent / "package_data/plotly.min.js", STAGE / "plotly.min.js")
        for name in [n for n, (t, _, _) in pages.items() if "class=\"js-plot\"" in t]:
            up = "../" * name.count("/")
            write(name, pages[name][0] + f"\n\n<script src=\"{up}plotly.min.js\"></script>\n<script src=\"{up}site.js\"></script>\n")
    titled = lambda n: {pages[n][1].replace("`", ""): n}
    inside = lambda folder: [titled(n) for n in pages if n.startswith(folder + "/") and not n.endswith("index.md")]
    methods = [{title: chosen} for title, pattern in LEVELS if (chosen := [titled(n) for n in pages if re.match(rf"{pattern}\d*_", n)])]
    listed = {n for group in methods for of in group.values() for d in of for n in d.values()}
    if lost := [n for n in pages if re.match(r"\d", n) and n not in listed]: raise SystemExit(f"{', '.join(lost)}: no place in the navigation; add a level to LEVELS in .ci/docs.py")
    nav: list = [{"Start": "index.md"}]
    if inside("tutorials"): nav.append({"Tutorials": inside("tutorials")})
    if inside("howto"): nav.append({"How to": inside("howto")})
    of = {nb: m for m, nb in modules.items()}
    reference = [{title: got} for group in methods for title, notebooks in group.items() if (got := [titled(f"api/{of[n]}.md") for d in notebooks for n in d.values() if n in of])]
    nav += [{"Methods": methods}, {"Benchmarks": ["benchmarks/index.md", *inside("benchmarks")]}, {"Gallery": "gallery.md"}, {"API": ["api/index.md", *reference]}, {"Contributing": "contributing.md"}]
    return nav


def api(module: str, notebook: str) -> str:
    "The page of a module: its public names in order, of a class its public methods and properties (the fields of a dataclass stand in its signature; those of a dataset file's sections each by itself)."
    tree = ast.parse((ROOT / "pcim_nb" / f"{module}.py").read_text(encoding="utf-8"))
    exported = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    sections = {n for n, c in classes.items() if any(getattr(b, "id", "") in ("_Section", "_Pixels", "BaseModel") for b in c.bases)}
    made = {c.name for c in tree.body if isinstance(c, (ast.ClassDef, ast.FunctionDef))}
    values = [n for n in exported if n not in made]
    single = {t.id for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)}
    together = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple) and any(getattr(e, "id", "") in values for e in n.targets[0].elts)]      # a, b = 1, 2
    values = [n for n in values if n in single]
    parts = [f"# pcim_nb.{module}\n\n{ast.get_docstring(tree) or ''}\n\n[{notebook.removesuffix('.md')}](../{notebook}) explains, shows and tests this module.\n"]
    for name in [*(n for n in exported if n in made), *values]:
        members = "null" if name in sections else json.dumps([n.name for n in classes[name].body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]) if name in classes else "false"
        parts.append(f"::: pcim_nb.{module}.{name}\n    options:\n      show_root_heading: true\n      show_root_toc_entry: true\n      show_root_full_path: false\n      members: {members}\n")
    return "\n".join(parts) + "".join(fence(ast.unparse(n), "python") for n in together)


def gallery(pages: dict) -> str:
    "Pictures of the notebooks' own outputs, each leading to its page; at most two a page, the largest ones (in bytes: most to see)."
    out = ["# Gallery\n\nEach picture is an output of the notebook that it leads to, made by the code that stands there.\n"]
    for title, wanted in (("Tutorials", r"tutorials/"), ("Methods", r"\d"), ("Benchmarks", r"benchmarks/")):
        tiles = []
        for name, (text, head, made) in pages.items():
            if not re.match(wanted, name): continue
            for p in sorted(sorted(made, key=lambda p: -(STAGE / "pictures" / p).stat().st_size)[:2]):
                alt = re.search(rf'{re.escape(p)}" alt="([^"]*)"', text)
                label = f"<b>{html.escape(head.replace('`', ''))}</b>" + (f"<br>{alt[1]}" if alt and html.unescape(alt[1]) != head else "")
                tiles.append(f'<a href="{name.removesuffix(".md")}.html"><img src="pictures/{p}" alt="{alt[1] if alt else html.escape(head)}" loading="lazy"><span>{label}</span></a>')
        if tiles: out.append(f"\n## {title}\n" + raw("\n".join(tiles), cls="gallery"))
    return "".join(out)


def benchmarks(pages: dict) -> str:
    "The table of checks of each benchmark, as the notebook in the repository holds it, with its command."
    out = ["# What is promised, and measured\n\nEach benchmark is a notebook that holds its figures against bounds set before. `pcim bench NAME` runs it and ends with exit status 1 when a figure falls short; "
           "`--small` takes at most ten minutes on two cores. The tables are those of the notebooks as they stand in the repository.\n"]
    for name, (text, head, _) in pages.items():
        if not name.startswith("benchmarks/"): continue
        stem = Path(name).stem
        tables = [t for t in re.findall(r"<table.*?</table>", text, re.S) if "<th>promised</th>" in t and "<th>figure</th>" in t]
        small = re.search(r"^small = (True|False)", text, re.M)
        out.append(f"\n## {head}\n\n```bash\npcim bench {stem}{' --small' if small and small[1] == 'True' else ''}\n```\n\n"
                   + (raw(re.sub("falls short", lambda m: f"<span class='falls-short'>{m[0]}</span>", tables[-1], flags=re.I)) if tables else "No run is kept in the repository.\n\n")
                   + f"[The whole benchmark]({stem}.md)\n")
    return "".join(out)


def build() -> None:
    nav = stage()
    config = ROOT / "build/mkdocs.yml"
    config.write_text(yaml.safe_dump({"INHERIT": "../.ci/mkdocs.yml", "docs_dir": str(STAGE), "site_dir": str(SITE), "nav": nav}, sort_keys=False, allow_unicode=True), encoding="utf-8")
    run = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "--quiet", "-f", str(config)], cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if run.returncode: raise SystemExit(run.returncode)
    index = SITE / "search/search_index.json"                      # Material asks for it in this form where the pages are opened from a folder
    index.with_suffix(".js").write_text(f"var __index = {index.read_text(encoding='utf-8')}", encoding="utf-8")
    print(SITE / "index.html")


if __name__ == "__main__": build()
