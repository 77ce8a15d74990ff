"""README.md from nbs/index.ipynb. `python .ci/readme.py` writes it; `readme()` gives the text."""
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The text of README.md: the notebook's prose and its code cells, without hidden cells and outputs."
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if "#| hide" not in c.source]
    for c in nb.cells:
        if c.cell_type == "code": c.outputs = []
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
