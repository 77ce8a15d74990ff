"The whole way: dataset file → report, on simulated and on real images; what the report promises is read from its numbers."
import fcntl
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from browser import CHROMIUM, NO_BROWSER, open_page

from pcim_nb.cli import main
from pcim_nb.datasets import load_spec

ROOT = Path(__file__).resolve().parent.parent


def report(name, out, *more):
    assert main(["report", str(name), "-o", str(out), "-q", *more]) == 0
    folder = out / load_spec(name).name
    return folder, json.loads((folder / "numbers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    "The demo report as the README's command makes it, made once, also when tests run in several processes."
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"): base = base.parent
    with open(base / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = base / "out/demo/numbers.json"
        if not made.exists(): report("demo", base / "out")
    return made.parent, json.loads(made.read_text(encoding="utf-8"))


def test_demo_keeps_its_promises(demo):
    folder, n = demo
    assert n["failed"] == {}
    assert n["metrics"]["accuracy"]["value"] >= 0.95
    assert n["planted_channel_found"] and all(n["planted_channel_found"].values()), n["shares"]
    assert n["dac"]["DeepLift"] > n["dac"]["Random"] + 0.1
    assert n["features"]["differ"] > 0 and not n["background"]["predicts"]
    assert (folder / "report.html").stat().st_size < 12e6


def test_demo_tables_are_whole(demo):
    folder, n = demo
    for csv in sorted((folder / "tables").glob("*.csv")):
        a, b = pd.read_csv(csv), pd.read_parquet(csv.with_suffix(".parquet"))
        assert a.shape == b.shape and len(a), csv.name
    shares = pd.read_csv(folder / "tables/attribution_shares.csv")
    mean = shares[shares.method == "DeepLift"].groupby(["class", "channel"])["share"].mean()
    for treatment, by_channel in n["shares"].items():
        for channel, share in by_channel.items(): assert abs(mean[treatment, channel] - share) < 1e-6
    wells = pd.read_csv(folder / "tables/units.csv")
    assert len(wells) == wells.Metadata_Unit.nunique() == n["features"]["units"]


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
@pytest.mark.parametrize("width", [400, 1400])
def test_demo_page_in_a_browser_without_network(demo, width):
    page = open_page(demo[0] / "report.html", width=width)
    assert page["console"] == [] and page["requests"] == []
    assert page["sideways"] <= 0
    assert page["dom"].count("js-plot") and page["dom"].count("main-svg") >= page["dom"].count('class="js-plot')


def test_second_run_trains_and_measures_nothing_again(fields):
    folder, spec = fields
    first, a = report(folder / "set.yaml", folder / "out")
    before = {p: p.stat().st_mtime_ns for d in ("model", "features") for p in (first / d).iterdir()}
    again, b = report(folder / "set.yaml", folder / "out")
    assert before and {p: p.stat().st_mtime_ns for p in before} == before
    assert a["metrics"] == b["metrics"] and a["shares"] == b["shares"] and a["dac"] == b["dac"]


def test_same_seed_same_report_and_another_seed_another(fields):
    folder, spec = fields
    a, b, c = (report(folder / "set.yaml", folder / f"out{k}", *more)[1] for k, more in enumerate([(), (), ("--set", "seed=5")]))
    assert a["shares"] == b["shares"] and a["metrics"] == b["metrics"] and a["dac"] == b["dac"]
    assert a["shares"] != c["shares"]


def test_report_with_the_users_own_model_and_feature_table(fields, monkeypatch):
    "A callable without gradients by import path, and a CellProfiler table instead of measuring."
    folder, spec = fields
    (folder / "my_lab.py").write_text("import numpy as np\n\ndef bright_er(n_channels, n_classes):\n"
                                      "    def scores(x):\n        er = x[:, 1].amax((1, 2)).numpy()\n        return np.stack([.35 - er, er - .35], 1) * 40\n    return scores\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    table = pd.read_csv(folder / "table.csv")
    table.assign(Cells_Intensity_MeanIntensity_ER=(table.treatment == "treated") + 0.1 * table.index % 7, Cells_Intensity_MeanIntensity_DNA=(table.index * 37 % 11) / 11).drop(
        columns=["FileName_DNA", "FileName_ER", "cells", "file_number", "treatment"]).to_csv(folder / "features.csv", index=False)
    spec |= {"model": {"architecture": "my_lab:bright_er", "pretrained": True}, "attribution": {"images_per_class": 2}, "profiles": {"table": "features.csv"}}
    (folder / "own.yaml").write_text(yaml.safe_dump(spec | {"name": "own"}, allow_unicode=True), encoding="utf-8")
    _, n = report(folder / "own.yaml", folder / "out")
    assert n["metrics"]["accuracy"]["value"] == 1 and n["failed"] == {}
    assert all(s["ER"] > 0.99 for s in n["shares"].values()) and n["method"] == "Occlusion"   # DeepLift, the default, cannot be used
    assert n["top_channels"]["treated vs control"] == {"attribution": "ER", "features": "ER"}


def test_weights_of_an_earlier_report_can_be_given(fields):
    folder, spec = fields
    first, a = report(folder / "set.yaml", folder / "out")
    spec["model"] = {"weights": str(first / "model/model.safetensors")}
    (folder / "set.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True), encoding="utf-8")
    _, b = report(folder / "set.yaml", folder / "out2")
    assert a["metrics"] == b["metrics"] and a["shares"] == b["shares"]
    (first / "model/model.safetensors").write_bytes(b"\x80\x04\x95 a pickle")
    assert main(["report", str(folder / "set.yaml"), "-o", str(folder / "out3"), "-q"]) == 1


def test_wheel_outside_the_checkout(fields, tmp_path):
    "A built wheel carries the report notebook, the template and the dataset files, and makes a report from a folder where there is no checkout."
    folder, _ = fields
    dist = tmp_path / "dist"
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)], check=True, capture_output=True)
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as z:
        names = set(z.namelist())
        z.extractall(tmp_path / "site")
    assert {"pcim_nb/reports/interpretation.ipynb", "pcim_nb/reports/demo.yaml", "pcim_nb/reports/pla.csv", "pcim_nb/reports/template/page.css"} <= names
    assert not any("out/" in n for n in names)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import pcim_nb, sys; from pcim_nb.cli import main; print(pcim_nb.__file__); sys.exit(main(sys.argv[1:]))"
    run = subprocess.run([sys.executable, "-c", code, "report", str(folder / "set.yaml"), "-o", str(tmp_path / "out"), "-q"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[0].startswith(str(tmp_path / "site"))
    assert (tmp_path / "out/fields/report.html").stat().st_size > 1e5


# Real images. Held-out groups only; the split and the settings stand in the dataset files.

def test_bbbc010(data, tmp_path):
    _, n = report("bbbc010", tmp_path)
    assert n["failed"] == {} and n["metrics"]["balanced accuracy"]["value"] >= 0.90
    assert n["background"]["predicts"] and n["background"]["auc"] > 0.75   # the report says so by itself


@pytest.mark.parametrize("name", ["bbbc021_cells", "pla", "glas"])
def test_real_sets_make_a_full_report(data, tmp_path, name):
    _, n = report(name, tmp_path)
    assert n["failed"] == {}
    assert {"metrics", "shares", "where", "dac", "features"} <= n.keys()
    if name == "pla":  # the dose is written in PLA and not in DNA: features and single-channel swaps say so (the unsigned share alone does not, see the README)
        assert n["top_channels"]["dots vs no dots"]["features"] == "PLA"
        assert n["dac_by_channel"]["PLA"] > 0.2 > abs(n["dac_by_channel"]["DNA"])
        assert n["dose"]["links"] == ["PLA"] and n["dose"]["p"] < 0.05
