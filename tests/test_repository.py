"The rules of the house that a machine can check: exports, clean notebooks, README, style, the direction of imports."
import ast
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
pytest.importorskip("nbdev", reason="nbdev is a development dependency: install .[dev]")


@pytest.fixture
def copy(tmp_path):
    "What nbdev reads and writes, in a folder of its own."
    for name in ("nbs", "pcim_nb", "reports"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "out"))
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def nbdev(command, cwd, *args):
    run = subprocess.run([str(Path(sys.executable).parent / command), *args], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_modules_are_exactly_what_the_notebooks_export(copy):
    for p in (copy / "pcim_nb").glob("*.py"):
        if p.name != "__init__.py": p.unlink()
    nbdev("nbdev_export", copy)
    made = {p.name: p.read_text() for p in (copy / "pcim_nb").glob("*.py")}
    kept = {p.name: p.read_text() for p in (ROOT / "pcim_nb").glob("*.py")}
    assert made.keys() == kept.keys()
    assert [n for n in made if made[n] != kept[n]] == [], "run nbdev_export"


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    nbdev("nbdev_clean", copy, "--fname", "reports")
    changed = [p.name for p in NOTEBOOKS + [ROOT / "reports/interpretation.ipynb"] if (copy / p.relative_to(ROOT)).read_text() != p.read_text()]
    assert changed == [], "run nbdev_clean"


def test_readme_is_made_from_the_index_notebook():
    readme = runpy.run_path(str(ROOT / ".ci/readme.py"))["readme"]
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run python .ci/readme.py"


def test_ruff_is_clean():
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "pcim_nb", "tests", ".ci"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


ORDER = "images simulate segment datasets fetch backbones classifiers wsol attribution sampling pcim blackbox amortised seeds stargan counterfactual masking metrics localisation pixelcam dac hybrids quality_gate fidelity profiles cellprofiler cytominer object_attribution linking enrichment association plots mask_plots link_plots pixel_plots page analysis translate report overview batch explorer bench cli".split()


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    tree = ast.parse((ROOT / "pcim_nb" / f"{module}.py").read_text())
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and (n.level == 1 or n.module.startswith("pcim_nb."))]
    imported = {n.module.removeprefix("pcim_nb.").split(".")[0] for n in froms}
    assert imported <= set(ORDER) and (imported or module in ("images", "cli")), imported
    above = set(ORDER[ORDER.index(module):])
    assert imported & above == set(), f"{module} imports {imported & above}"


def test_every_module_has_its_place_in_the_order():
    assert {p.stem for p in (ROOT / "pcim_nb").glob("*.py")} - {"__init__", "_modidx"} == set(ORDER)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_carry_no_error_and_stay_small(path):
    nb = nbformat.read(path, as_version=4)
    assert not [o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert path.stat().st_size < 1_500_000


def test_versions_agree():
    version = runpy.run_path(str(ROOT / "pcim_nb/__init__.py"))["__version__"]
    assert f"version = {version}\n" in (ROOT / "settings.ini").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
