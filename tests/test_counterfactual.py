"Counterfactuals from end to end: a training that is killed, damaged files, pairs from elsewhere, and what the quality gate says of good and bad ones."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from pcim_nb.counterfactual import make_pairs, pair_table, write_pairs
from pcim_nb.datasets import load_spec, open_dataset
from pcim_nb.images import ImageSet, PcimError
from pcim_nb.quality_gate import chance_level, frechet, nearest_training, quality_gate
from pcim_nb.stargan import Translator, checkpoints, load_translator, settings_of, train_translator

SIZE = 24


def blobs(n=48, seed=0, shuffled=False):
    "Two stains; class 1 has a brighter second one inside the blob, nothing else. The exact counterfactual comes with it."
    g, (yy, xx) = np.random.default_rng(seed), np.mgrid[:SIZE, :SIZE]
    y, plate = np.arange(n) % 2, np.arange(n) // 2 % 3
    x, cf, lab = np.zeros((n, 2, SIZE, SIZE), np.float32), np.zeros((n, 2, SIZE, SIZE), np.float32), np.zeros((n, SIZE, SIZE), np.int32)
    for i in range(n):
        cell = np.hypot(yy - SIZE / 2 - g.normal(0, 1), xx - SIZE / 2 - g.normal(0, 1)) < g.uniform(5, 7)
        noise = g.normal(0, .01, (2, SIZE, SIZE))
        for out, k in ((x, y[i]), (cf, 1 - y[i])): out[i] = (.1 + noise + cell * np.array([.4, .25 + .3 * k])[:, None, None]).clip(0, 1)
        lab[i] = cell
    return ImageSet(x, ["DNA", "marker"], g.permutation(y) if shuffled else y, ["control", "treated"], pd.DataFrame({"Metadata_Plate": [f"P{p}" for p in plate]}), group="Metadata_Plate",
                    objects={"Cells": lab}, counterfactuals=cf, counterfactual_labels=1 - y, name="blobs", ids=[f"c{y[i]}/cell{i:03d}.tif" for i in range(n)])


def judge(x):
    "Knows the answer: is the middle of the second stain as bright as that of the first?"
    m = x[:, 1, 10:14, 10:14].mean((1, 2)) - .5
    return torch.stack([-m, m], 1) * 30


TRAIN = dict(size="tiny", steps=24, every=4, seed=5, pictures=False, progress=False)
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_counterfactual import blobs, TRAIN
from pcim_nb.stargan import train_translator
train_translator(blobs(), range(32), sys.argv[1], **TRAIN)
"""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(folder):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(Path(__file__).parent)], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_and_started_again_it_ends_with_the_same(tmp_path, one_thread):
    iset = blobs()
    whole = train_translator(iset, range(32), tmp_path / "whole", **TRAIN)
    run = start(tmp_path / "killed")
    for _ in range(2400):
        if list((tmp_path / "killed/checkpoints").glob("step_*.json")) or run.poll() is not None: break
        time.sleep(.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not (tmp_path / "killed/translator.safetensors").exists()
    again = train_translator(iset, range(32), tmp_path / "killed", **TRAIN)
    assert 4 <= again.resumed < 24 and all("no such file" in v for v in again.notes)      # at most a checkpoint whose description was not written yet
    x = iset.load(range(32, 48))
    a, b = (t.translator.translate(x, 1 - iset.labels[32:48]) for t in (whole, again))
    assert torch.allclose(a, b, atol=1e-4) and not torch.allclose(a, x, atol=1e-3)
    assert torch.equal(load_translator(tmp_path / "killed").translate(x, 1), again.translator.translate(x, 1))


@pytest.mark.parametrize("harm", ["cut", "changed", "no json", "json cut", "weights gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, harm, one_thread):
    iset, folder = blobs(), tmp_path / "t"
    train_translator(iset, range(32), folder, **{**TRAIN, "steps": 12})
    older, last = checkpoints(folder)
    (folder / "translator.json").unlink()
    about, data = last.with_suffix(".json"), last.read_bytes()
    if harm == "cut": last.write_bytes(data[: len(data) // 2])
    if harm == "changed": last.write_bytes(data[:-64] + bytes(64))
    if harm == "no json": about.unlink()
    if harm == "json cut": about.write_text(about.read_text()[:200])
    if harm == "weights gone": last.unlink()
    if harm == "weights gone":      # nothing claims to be a checkpoint, so there is nothing to complain of
        again = train_translator(iset, range(32), folder, **{**TRAIN, "steps": 12})
        assert again.notes == []
    else:
        with pytest.warns(UserWarning, match="the checkpoint before it is used"): again = train_translator(iset, range(32), folder, **{**TRAIN, "steps": 12})
        assert last.stem in again.notes[0] and "\n" not in again.notes[0]
    assert again.resumed == int(older.stem[5:]) == 8 and load_translator(folder).about["step"] == 12


def test_all_checkpoints_damaged_it_starts_anew_and_says_so(tmp_path, one_thread):
    iset, folder = blobs(), tmp_path / "t"
    train_translator(iset, range(32), folder, **{**TRAIN, "steps": 8})
    for p in checkpoints(folder): p.write_bytes(b"x")
    with pytest.warns(UserWarning): again = train_translator(iset, range(32), folder, **{**TRAIN, "steps": 8})
    assert again.resumed == 0 and "starts anew" in again.notes[-1] and len(again.notes) == 2


def test_a_pickle_in_place_of_weights_is_not_opened(tmp_path):
    t = Translator(["a"], ["x", "y"], 16, settings_of("tiny"))
    from pcim_nb.stargan import save_translator
    path = save_translator(t, tmp_path)
    torch.save({"generator": 1}, path)
    with pytest.raises(PcimError, match="damaged"): load_translator(tmp_path)
    (tmp_path / "translator.json").write_text(json.dumps({"format": "something"}))
    with pytest.raises(PcimError, match="does not describe translator"): load_translator(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    iset = blobs(96)
    idx = np.flatnonzero(iset.groups != "P2")
    folder = tmp_path_factory.mktemp("trained")
    return iset, idx, {False: train_translator(iset, idx, folder / "right", "tiny", 250, every=125, pictures=False, progress=False).translator,
                       True: train_translator(iset, idx, folder / "shuffled", "tiny", 250, every=125, pictures=False, progress=False, labels=np.random.default_rng(0).permutation(iset.labels[idx])).translator}


def test_it_learns_what_the_classes_differ_in(trained):
    iset, idx, made = trained
    new = np.flatnonzero(iset.groups == "P2")
    pairs = make_pairs(iset, new, "generated", given=made[False])
    gate = quality_gate(pairs, judge, iset, idx, np.stack([iset.label_image("Cells", i) > 0 for i in new]), made[False])
    assert gate["called as intended"] > .8 and gate.converts and gate["outside over inside"] < 1 / 3
    exact = make_pairs(iset, new, "exact")
    moved, truth = ((p.counterfactuals - p.images)[:, :, 9:15, 9:15].mean((2, 3)).numpy() for p in (pairs, exact))
    assert (np.sign(moved[:, 1]) == np.sign(truth[:, 1])).mean() > .8 and np.abs(moved[:, 0]).mean() < .5 * np.abs(moved[:, 1]).mean()
    assert gate["cycle error"] < .1 and gate["identity error"] < .1


def test_shuffled_labels_convert_no_better_than_chance_and_the_gate_says_so(trained):
    iset, idx, made = trained
    new = np.flatnonzero(iset.groups == "P2")
    gate = quality_gate(make_pairs(iset, new, "generated", given=made[True]), judge, iset, idx)
    assert not gate.converts and any("no better than chance" in v for v in gate.wary)


def test_the_gate_counts_each_pair_once():
    iset = blobs()
    new = np.flatnonzero(iset.groups == "P2")
    p = make_pairs(iset, new, "exact")
    bad = p.counterfactuals.clone()
    bad[0] = p.images[0]                                                # nothing changed, so not converted
    bad[1, :, :8] += .3                                                 # outside the cell
    gate = quality_gate(type(p)(p.index, p.images, bad, p.labels, p.counterfactual_labels, "mine"), judge, iset, np.flatnonzero(iset.groups != "P2"), np.stack([iset.label_image("Cells", i) > 0 for i in new]))
    assert gate.pairs.reason.tolist()[:3] == ["not called as intended", "changed outside the cell", ""]
    assert gate.passed.sum() == len(new) - 2 == gate.reasons().set_index("reason").loc["passed", "pairs"]
    assert f"{len(new) - 2} of {len(new)} pairs pass" in gate.summary() and "1 changed outside the cell" in gate.summary()


def test_frechet_and_copies_against_plain_formulas():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 4)), rng.normal(size=(300, 4)) @ np.diag([1, 2, .5, 1]) + 1
    ca, cb = np.cov(a.T), np.cov(b.T)
    w, v = np.linalg.eigh(ca)
    half = v @ np.diag(w**.5) @ v.T
    root = np.sqrt(np.linalg.eigvalsh(half @ cb @ half).clip(0)).sum()      # trace of (ca cb)^½, by another way
    assert frechet(a, b) == pytest.approx(((a.mean(0) - b.mean(0))**2).sum() + np.trace(ca) + np.trace(cb) - 2 * root, rel=1e-6)
    x, bank = torch.rand(6, 2, 16, 16), torch.rand(9, 2, 16, 16)
    std = bank.numpy().std((0, 2, 3), ddof=1)[None, :, None, None]
    turn = lambda im, k: np.rot90(im[..., ::-1] if k > 3 else im, k % 4, (-2, -1))
    plain = [min(np.sqrt((((turn(i, k) - j) / std[0])**2).mean()) for k in range(8) for j in bank.numpy()) for i in x.numpy()]
    assert np.allclose(nearest_training(x, bank), plain, atol=1e-4)
    assert chance_level([0, 1, 1, 1], [1, 0, 1, 0], 2) == .25 * .5 + .75 * .5


def test_pairs_that_quac_wrote(tmp_path):
    "8-bit RGB files, source class/target class/same file name as the image."
    iset = ImageSet(np.zeros((4, 3, 20, 20), np.float32), ["r", "g", "b"], [0, 1, 0, 1], ["DMSO", "drug"], ids=["DMSO/a.png", "drug/a.png", "DMSO/b.png", "drug/c.png"])
    for i, (s, t, name) in enumerate([("DMSO", "drug", "a"), ("drug", "DMSO", "a"), ("DMSO", "drug", "b"), ("DMSO", "drug", "unknown")]):
        (tmp_path / s / t).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), [51 * i, 102, 255], np.uint8)).save(tmp_path / s / t / f"{name}.png")
    p = make_pairs(iset, [0, 1, 2], "pairs", given=tmp_path)
    assert p.counterfactual_labels.tolist() == [1, 0, 1] and torch.allclose(p.counterfactuals[:, :, 0, 0], torch.tensor([[0, .4, 1], [.2, .4, 1], [.4, .4, 1]]))
    table = pair_table(tmp_path, iset)
    assert sorted(table["index"]) == [0, 1, 2] and len(table.attrs["other"]) == 1 and "unknown" in table.attrs["other"][0]
    with pytest.raises(PcimError, match=r"no picture for 1 of 2 images, the first: drug/c.png"): make_pairs(iset, [0, 3], "pairs", given=tmp_path)


@pytest.mark.parametrize("harm, said", [("class", "a class 'placebo'"), ("empty", "no pictures in"), ("cut", "truncated|unreadable"), ("float", "intensities from"), ("twice", "two pictures of"), ("size", "expected 2×24×24")])
def test_pairs_that_do_not_fit(tmp_path, harm, said):
    iset = blobs(8)
    if harm != "empty": write_pairs(make_pairs(iset, range(8), "exact"), iset, tmp_path)
    file = tmp_path / "control/treated/cell000.tif"
    if harm == "class": (tmp_path / "control/placebo").mkdir(); file.rename(tmp_path / "control/placebo/cell000.tif")
    if harm == "cut": file.write_bytes(file.read_bytes()[:-600])
    if harm == "float": tifffile.imwrite(file, np.full((2, SIZE, SIZE), 7., np.float32), photometric="minisblack")
    if harm == "twice": np.save(file.with_suffix(".npy"), np.zeros((2, SIZE, SIZE), np.uint8))
    if harm == "size": tifffile.imwrite(file, np.zeros((2, 9, 9), np.uint16), photometric="minisblack")
    with pytest.raises(PcimError, match=said) as e: make_pairs(iset, range(8), "pairs", given=tmp_path)
    assert "\n" not in str(e.value)


def test_real_cells_are_translated_whole_and_repeatably(data):
    "A few steps on real images of 68×68 pixels (windows of 64): everything fits together. What it can do is measured by `pcim bench counterfactual`."
    iset = open_dataset(load_spec("bbbc021_cells"), data)
    idx = np.flatnonzero(iset.groups == "Week4_27801")[::20]
    a, b = (train_translator(iset, idx, None, "tiny", 6, crop=64, progress=False).translator for _ in range(2))
    x = iset.load(np.flatnonzero(iset.groups == "Week4_27821")[:3])
    assert torch.equal(a.translate(x, 1), b.translate(x, 1)) and a.translate(x, 1).shape == x.shape and a.crop == 64
