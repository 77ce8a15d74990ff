"The explorer against a truth that is known in closed form, and in a real JupyterLab with a real browser."
import base64
import io
import json
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import browser
import nbformat
import numpy as np
import pytest
import torch
from browser import CHROMIUM, NO_BROWSER
from PIL import Image

from pcim_nb.dac import dac
from pcim_nb.datasets import parse_spec
from pcim_nb.explorer import Explorer, Look, explore, open_study, png
from pcim_nb.images import PcimError
from pcim_nb.masking import rank_masks

# A set of 24 images with a disc; in class "bright" the disc is brighter in ER. The classifier is a plane: it sees the mean of ER and nothing else.
MADE = '''
import numpy as np, pandas as pd, torch
from pcim_nb.classifiers import Split
from pcim_nb.datasets import parse_spec
from pcim_nb.explorer import Study
from pcim_nb.images import ImageSet

class Plane(torch.nn.Module):
    "Logits (0, 60·(mean of ER − 0.15))."
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(60.))
    def forward(self, x):
        s = self.scale * (x[:, 1].mean((1, 2)) - .15)
        return torch.stack([torch.zeros_like(s), s], 1)

def study():
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:40, :40]
    images, cells, rows, labels = [], [], [], []
    for k in range(24):
        disc = (yy - 20 - k % 3) ** 2 + (xx - 20 + k % 4) ** 2 < 144
        images.append(np.stack([.1 + .5 * disc, .1 + (.5 if k % 2 else .1) * disc, .1 + .3 * disc]) + rng.uniform(0, .05, (3, 40, 40)))
        cells.append(disc.astype(np.int32)); labels.append(k % 2)
        rows.append({"Metadata_Plate": f"P{k // 8}", "Metadata_Well": f"{'AB'[k % 2]}{k // 2 % 2}"})
    iset = ImageSet(np.clip(np.array(images, np.float32), 0, 1), ["DNA", "ER", "Mito"], np.array(labels), ["dim", "bright"], pd.DataFrame(rows), "Metadata_Plate", "Metadata_Well", objects={"Cells": np.array(cells)}, name="discs")
    spec = parse_spec({"name": "discs", "images": {"reader": "simulator"}, "labels": {"control": "dim"}, "attribution": {"methods": ["IntegratedGradients", "Residual", "Random"]}, "masking": {"counterfactual": "nearest", "steps": 30, "mode": "exact"}, "profiles": {"families": ["intensity"]}})
    at = np.arange(24)
    return Study(spec, iset, Plane(), at[at >= 16], Split(at[:8], at[8:16], at[16:]))
'''


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "made.py"
    path.write_text(MADE)
    return runpy.run_path(str(path))["study"]


@pytest.fixture
def study(make): return make()


def shown(widget): return np.asarray(Image.open(io.BytesIO(widget.value)))


def test_a_slider_step_is_what_masking_and_dac_say(study):
    ex = Explorer(study)
    i = ex.cell.value
    assert study.iset.labels[i] == 1 and ex.method.value == "IntegratedGradients"
    pair, a, m = study.pair(i), study.map(i, "IntegratedGradients"), study.spec.masking
    assert study.iset.labels[pair.index[0]] == 1 and pair.counterfactual_labels[0] == 0
    ex.view.value = "joint"
    from pcim_nb.masking import normalise
    masks, sizes = rank_masks(normalise(a), m.steps, m.closing, m.blur)
    direct = dac(study.model, pair, a, "joint", study.iset.channels, m.steps, m.closing, m.blur, only_right=False).curves
    for t in (0, 3, 11, 29):
        ex.mask.value = t
        hybrid = pair.counterfactuals[0] + masks[0, t] * (pair.images[0] - pair.counterfactuals[0])
        assert np.abs(shown(ex.pictures["hybrid"]).astype(int) - ex.look.picture(hybrid.numpy())).max() <= 1
        assert np.abs(shown(ex.pictures["mask"]).astype(int) - ex.look.mask(masks[0, t].numpy())).max() <= 1
        point = ex.dac.data[-1]
        assert point.x[0] == pytest.approx(float(sizes[0, t]), abs=1e-6) and point.y[0] == pytest.approx(direct.score[t], abs=1e-6)
        with torch.no_grad(): gain = (study.model(hybrid[None]).softmax(1) - study.model(pair.counterfactuals).softmax(1))[0, 1].item()
        assert point.y[0] == pytest.approx(gain, abs=1e-5)


def test_the_stain_that_the_classifier_sees_does_it_alone(study):
    i = study.cells[1]
    p = {c: study.dac_score(i, "Residual", f"only {c}") for c in study.iset.channels}
    assert p["ER"] > .4 and abs(p["DNA"]) < 1e-6 and abs(p["Mito"]) < 1e-6
    ex = Explorer(study)
    ex.method.value, ex.view.value = "Residual", "only ER"
    assert [t.name for t in ex.dac.data[:-1]] == ["DNA", "ER", "Mito"] and f"{p['ER']:.2f}" in ex.dac.layout.title.text
    ex.mask.value = 29
    x, y = study.step(ex.cell.value, "Residual", "only ER", 29).hybrid, study.pair(ex.cell.value)
    assert torch.allclose(x[1], y.images[0, 1], atol=1e-6) and torch.equal(x[[0, 2]], y.counterfactuals[0, [0, 2]])


def test_channels_on_off_and_contrast(study):
    ex = Explorer(study)
    i, lim = ex.cell.value, ex.look.limits
    before = {k: v.value for k, v in ex.pictures.items()}
    ex.on["ER"].value = False
    assert all(ex.pictures[k].value != before[k] for k in ("counterfactual", "hybrid", "image", "attribution")) and ex.pictures["mask"].value == before["mask"]
    assert (shown(ex.pictures["image"]) == Look(study.iset.channels, lim, np.array([True, False, True])).picture(study.iset.image(i))).all()
    assert (ex.look.attribution(study.map(i, ex.method.value)[0].numpy()).std((0, 1)) == 0).all()             # nothing is attributed to the stains that the classifier does not see
    ex.on["ER"].value = True
    assert {k: v.value for k, v in ex.pictures.items()} == before
    for c in ("DNA", "Mito"): ex.on[c].value = False
    dim = shown(ex.pictures["image"]).mean()
    ex.contrast["ER"].value = (0, ex.contrast["ER"].value[1] / 2)
    assert shown(ex.pictures["image"]).mean() > 1.2 * dim
    assert (shown(ex.pictures["image"])[..., 1] > 0).any() and ex.contrast["ER"].style.handle_color == "#009E73"


def test_from_a_feature_to_cells_and_back(study):
    from plotly.callbacks import InputDeviceState, Points

    def click(trace, k): [f(trace, Points(point_inds=[k]), InputDeviceState()) for f in trace._click_callbacks]

    ex = Explorer(study)
    ex.tabs.selected_index = 2
    f = "Cells_Intensity_MeanIntensity_ER"
    at = ex._points[1].index(f)
    click(ex.volcano.data[1], at)
    assert ex.feature.value == f and ex.volcano.data[1].x[at] > 3                                  # bright cells have more ER
    most, least = study.cells_with(f)
    assert set(study.iset.labels[most]) == {1} and set(study.iset.labels[least]) == {0}
    assert ex.slots[2][0].value == png(ex.look.picture(study.iset.image(most[2])))
    ex.slots[8][1].click()
    assert ex.cell.value == least[2] and ex._tops == study.top_features(least[2]).feature.tolist()[::-1]
    click(ex.strip.data[1], 1)
    assert ex.cell.value == 3 and "trained on this cell" in ex.said.value                            # the second bright image, of a training plate
    z = study.unusual.loc[3, f]
    own = np.array([study.iset.image(j)[1][study.iset.label_image("Cells", j) > 0].mean() for j in range(0, 8, 2)])       # the control cells of its plate: fewer than five
    control = np.array([study.iset.image(j)[1][study.iset.label_image("Cells", j) > 0].mean() for j in range(0, 24, 2)])
    mine = study.iset.image(3)[1][study.iset.label_image("Cells", 3) > 0].mean()
    assert len(own) == 4 and z == pytest.approx((mine - np.median(control)) / (1.4826 * np.median(np.abs(control - np.median(control)))), rel=1e-4)
    click(ex.bars.data[0], 0)
    assert ex.feature.value == ex._tops[0]


def test_what_cannot_be_shown_is_said(study):
    study.methods = [*study.methods, "GradCAM"]
    ex = Explorer({"one": study, "broken": lambda: open_study("no_such_file.yaml")})
    ex.method.value = "GradCAM"                                                                     # a plane has no layer of feature maps
    assert "nn.Conv2d" in ex.status.value and not ex.dac.data and shown(ex.pictures["hybrid"]).std() == 0
    ex.method.value = "Residual"
    assert ex.status.value == "" and ex.dac.data
    ex.data.value = "broken"
    assert "no_such_file" in ex.status.value and ex.data.value == "one" and ex.study is study
    with pytest.raises(PcimError, match="studies"): Explorer({})
    with pytest.raises(PcimError, match="no_such_file"): explore("no_such_file.yaml")


def test_a_cell_without_counterfactual_is_not_shown_as_another(study, monkeypatch):
    from pcim_nb import explorer
    ex = Explorer(study)
    def refuse(*args, **kw): raise PcimError("counterfactuals: none for this cell; expected one")
    monkeypatch.setattr(explorer, "make_pairs", refuse)
    ex.select(0)                                                                                      # a cell that was not on the list
    assert "none for this cell" in ex.status.value and not ex.dac.data and all(shown(v).std() == 0 for v in ex.pictures.values())
    ex.select(study.cells[1])                                                                         # one whose pair was made before
    assert ex.status.value == "" and ex.dac.data and shown(ex.pictures["image"]).std() > 0


def test_a_method_that_doubts_its_map_says_so(study, monkeypatch):
    import warnings

    from pcim_nb import explorer
    made = explorer.attribute_pairs
    def doubtful(name, *args, **kw):
        if name == "Residual": warnings.warn("Residual: do not <trust> this", stacklevel=2)
        return made(name, *args, **kw)
    monkeypatch.setattr(explorer, "attribute_pairs", doubtful)
    ex = Explorer(study)
    assert "trust" not in ex.said.value
    ex.method.value = "Residual"
    assert "do not &lt;trust&gt; this" in ex.said.value and ex.dac.data
    ex.mask.value = 3
    assert "do not &lt;trust&gt; this" in ex.said.value


def test_no_figure_sends_anything(study):
    ex = Explorer(study)
    for fig in (ex.dac, ex.compared, ex.volcano, ex.strip, ex.bars):
        assert fig._config["modeBarButtons"] == [["toImage", "zoom2d", "pan2d", "resetScale2d"]] and fig._config["plotlyServerURL"] == ""


# ---- in JupyterLab ----
class Lab:
    "JupyterLab on localhost over `folder`, with nothing of this user's settings."
    def __init__(self, folder: Path, home: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.token, names = secrets.token_hex(16), ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR")
        self.log = home / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
                                             "--ServerApp.allow_root=True", "--expose-app-in-browser", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
                                            env=os.environ | {k: str(home / k.lower()) for k in names}, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 60
        while True:
            try: return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=5).close()
            except OSError:
                if time.monotonic() > until or self.process.poll() is not None:
                    self.close()
                    raise RuntimeError(f"JupyterLab did not start: {self.log.read_text()[-2000:]}") from None
                time.sleep(.2)

    def close(self):
        try: os.killpg(self.process.pid, signal.SIGTERM)
        except ProcessLookupError: pass
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL)


_PIXELS = """(n => { const i = document.querySelectorAll('.jupyter-widgets img')[n], c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight;
  const x = c.getContext('2d'); x.drawImage(i, 0, 0); return c.toDataURL('image/png'); })(%d)"""


def picture(b, n):
    "The pixels of the n-th picture as the browser has them."
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b.run(_PIXELS % n).split(",")[1]))).convert("RGB"))


def press(b, element, x=.5, y=.5):
    "A click of the mouse in an element (a JavaScript expression), `x` and `y` from its upper left corner in parts of its size."
    b.run(f"({element}).scrollIntoView({{block: 'center'}})")
    time.sleep(.3)
    left, top, width, height = b.run(f"(r => [r.x, r.y, r.width, r.height])(({element}).getBoundingClientRect())")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        b.call("Input.dispatchMouseEvent", type=kind, x=left + x * width, y=top + y * height, button="none" if kind == "mouseMoved" else "left", clickCount=1)
        time.sleep(.1)


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_in_jupyterlab(tmp_path, make, monkeypatch):
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    monkeypatch.setattr(browser, "_FLAGS", [f for f in browser._FLAGS if not f.startswith("--proxy-bypass")] + ["--proxy-bypass-list=127.0.0.1"])
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir(), home.mkdir()
    (work / "made.py").write_text(MADE)
    code = "from made import study\nfrom pcim_nb.explorer import Explorer\nExplorer(study())"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}), work / "n.ipynb")
    truth = Explorer(make())                                                  # the same explorer, here
    lab = Lab(work, home)
    try:
        with browser.Browser() as b:
            b.call("Emulation.setDeviceMetricsOverride", width=1400, height=1200, deviceScaleFactor=1, mobile=False)
            b.call("Page.navigate", url=f"http://127.0.0.1:{lab.port}/lab/tree/n.ipynb?reset&token={lab.token}")
            b.wait("window.jupyterapp.shell.currentWidget.context.isReady && window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'", 240)
            b.run("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => 0)")
            said = "document.querySelector('.jupyter-widgets').innerText"
            b.wait(f"{said}.includes('pixels put back') && [...document.querySelectorAll('.jupyter-widgets img')].filter(i => i.naturalWidth == 40).length >= 5 && document.querySelectorAll('.js-plotly-plot .scatterlayer').length > 0", 300)
            order = ["counterfactual", "hybrid", "image", "mask", "attribution"]
            off = lambda k: int(np.abs(picture(b, order.index(k)).astype(int) - shown(truth.pictures[k])).max())
            assert {k: off(k) for k in order} == dict.fromkeys(order, 0)
            # the slider
            before, text = picture(b, 1), b.run(said)
            press(b, "[...document.querySelectorAll('.widget-hslider .noUi-base')].at(-1)", x=.62)
            b.wait(f"{said} != {json.dumps(text)}")
            i, n = truth.cell.value, truth.mask.max
            truth.mask.value = round(.62 * n)
            share = f"{truth.study.step(i, truth.method.value, truth.view.value, truth.mask.value).size:.1%}"
            b.wait(f"{said}.includes({share!r})")
            b.wait("[...document.querySelectorAll('.jupyter-widgets img')].every(i => i.complete)")
            assert not np.array_equal(picture(b, 1), before)
            assert {k: off(k) for k in order} == dict.fromkeys(order, 0)
            # a stain off
            press(b, "document.querySelectorAll('.widget-checkbox input')[1]")
            truth.on["ER"].value = False
            until = time.monotonic() + 20
            while off("image") and time.monotonic() < until: time.sleep(.1)
            assert {k: off(k) for k in order} == dict.fromkeys(order, 0)
            # features: a click on a cell among all
            press(b, "document.querySelectorAll('.jupyter-widgets .lm-TabBar-tab')[2]")
            b.wait("document.querySelectorAll('.js-plotly-plot .barlayer .point').length > 5 && document.querySelectorAll('.js-plotly-plot .scatterlayer .point').length > 50", 90)
            chosen = "document.querySelectorAll('.widget-dropdown select')[1].value"
            was = b.run(chosen)
            strip = "[...document.querySelectorAll('.js-plotly-plot')].filter(d => d.checkVisibility())[1]"
            alone = b.run(f"""(d => {{ const at = e => (r => [r.x + r.width / 2, r.y + r.height / 2])(e.getBoundingClientRect()), all = [...d.querySelectorAll('.scatterlayer .point')];
              const far = e => Math.min(...all.filter(o => o != e).map(o => Math.hypot(at(o)[0] - at(e)[0], at(o)[1] - at(e)[1])));
              const dim = [...d.querySelectorAll('.scatterlayer .trace')[0].querySelectorAll('.point')].map(far); return dim.indexOf(Math.max(...dim)) }})({strip})""")
            press(b, f"{strip}.querySelectorAll('.scatterlayer .trace')[0].querySelectorAll('.point')[{alone}]")
            b.wait(f"{chosen} != {json.dumps(was)}")
            assert b.run(chosen) == truth.study.describe(2 * alone)             # the dim images are those with even numbers
            buttons = b.run("[...new Set([...document.querySelectorAll('.modebar-btn')].map(e => e.dataset.title))]")
            assert buttons == ["Download plot", "Zoom", "Pan", "Reset axes"]
            assert [u for u in b.requests() if not u.startswith(f"http://127.0.0.1:{lab.port}/") and not u.startswith(f"ws://127.0.0.1:{lab.port}/")] == []
            assert [c for c in b.console() if c.startswith(("exception", "error"))] == []
    finally: lab.close()
