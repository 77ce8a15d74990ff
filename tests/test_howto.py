"The how-to pages hold true: their dataset files are read, their Python runs, their command lines are understood."
import inspect
import re
import shlex
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import yaml
from conftest import write_fields

from pcim_nb import batch
from pcim_nb.cli import parser
from pcim_nb.datasets import load_spec, parse_spec, reports_folder

PAGES = sorted((Path(__file__).resolve().parent.parent / "nbs/howto").glob("*.md"))
pytestmark = pytest.mark.skipif(not PAGES, reason="no how-to pages in this checkout")


def blocks(page, language): return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder with a small screen in it, as the pages speak of it, and CellProfiler's tables of its cells."
    write_fields(tmp_path, n_plates=3, wells=2, fields=2)
    table = pd.read_csv(tmp_path / "table.csv")
    (tmp_path / "cellprofiler").mkdir()
    image = table.assign(ImageNumber=range(1, len(table) + 1))
    image[["ImageNumber", "FileName_DNA", "FileName_ER", "Metadata_Plate", "Metadata_Well"]].to_csv(tmp_path / "cellprofiler/Image.csv", index=False)
    pd.DataFrame({"ImageNumber": image.ImageNumber, "ObjectNumber": 1, "Intensity_MeanIntensity_ER": range(len(image)), "AreaShape_Area": 314.0}).to_csv(tmp_path / "cellprofiler/Cells.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def name_of(text): return m[1] if (m := re.match(r"# (\S+\.(?:ya?ml|py))\n", text)) else None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_runs(page, desk, monkeypatch):
    matplotlib.use("agg")
    known = inspect.signature(batch.run_batch)                               # whole batches are run in test_batch.py; here the call is held against the function

    def asked(*args, **kw):
        known.bind(*args, **kw)
        return pd.DataFrame([("my_screen", "done", 1.0)], columns=["name", "state", "seconds"])

    monkeypatch.setattr(batch, "run_batch", asked)
    for other in PAGES:                                                      # the files that pages tell to write
        for text in blocks(other, "yaml") + blocks(other, "python"):
            if name := name_of(text): (desk / name).write_text(text, encoding="utf-8")
    for name in ("my_screen.yaml", "cp.yaml"):                               # short enough for a test; what the pages say stays as it is
        spec = yaml.safe_load((desk / name).read_text())
        spec |= {"model": {"options": {"width": 4, "depth": 2}, "train": {"epochs": 1}}, "attribution": {"methods": ["InputXGradient"], "images_per_class": 1}, "masking": {"steps": 10, "images_per_class": 1}}
        if name == "my_screen.yaml": spec["profiles"] = {"families": ["intensity"]}
        (desk / name).write_text(yaml.safe_dump(spec))
    namespace = {"__name__": "page"}
    for text in blocks(page, "python"): exec(compile(re.sub(r"epochs=30", "epochs=2", text), f"{page.name}", "exec"), namespace)
    if page.stem == "4_cellprofiler": assert len(namespace["table"]) == 24 and namespace["table"].Cells_Intensity_MeanIntensity_ER.astype(float).sum() == sum(range(24))
    if page.stem == "5_your_classifier": assert namespace["share"][0, 1] > .85                # it reads the second stain only


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_dataset_files_are_read(page, desk):
    for text in blocks(page, "yaml"):
        if name := name_of(text):
            (desk / name).write_text(text, encoding="utf-8")
            assert load_spec(desk / name).name == Path(name).stem
        else: parse_spec({**yaml.safe_load((reports_folder() / "demo.yaml").read_text()), **yaml.safe_load(text)})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_command_lines_are_understood(page):
    known = next(a for a in parser()._actions if a.choices and "report" in a.choices).choices
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if not line.startswith("pcim "): continue
        words = shlex.split(line, comments=True)[1:]
        assert words[0] in known, line
        parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_to_notebooks_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or "/api/" in target: continue                     # the API pages are made with the site, which checks them
        assert (page.parent / target).exists(), target
