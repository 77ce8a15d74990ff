"PixelCAM across modules: planted truths, sampling, any encoder, fold lists, hostile input, and GlaS where it is."
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

from pcim_nb.classifiers import build, predict, split_groups, train
from pcim_nb.datasets import data_root, load_spec, open_dataset
from pcim_nb.images import PcimError
from pcim_nb.localisation import best_threshold, overlap, pixel_counts, pxap
from pcim_nb.pixel_plots import disagreement_maps, localisation_curve, localisation_overlays
from pcim_nb.pixelcam import PixelCAM, draw_pixels, load_pixelcam, localise, pixelcam_results, save_pixelcam, train_pixelcam
from pcim_nb.seeds import AttentionMIL, feature_levels, seed_maps, stored_maps
from pcim_nb.simulate import discs
from pcim_nb.wsol import gland_patches, official_split, read_fold, shifted


@pytest.fixture(scope="module")
def toy():
    torch.set_num_threads(1)
    iset = discs(72)
    split = split_groups(iset.labels, iset.groups, seed=0)
    net, _ = train(build("small_cnn", 2, 2, width=8, depth=3, pooling="mean"), iset, split, epochs=15, batch_size=16, lr=.01, patience=15, progress=False)
    return iset, split, net


def plain_draws(m, n_fg, n_bg, min_p, rng):
    "Foreground and background pixels of one map, drawn one after the other."
    flat = m.ravel()
    low = np.sort(flat)[max(1, round(min_p * len(flat))) - 1]
    fg = rng.choice(len(flat), n_fg, replace=False, p=flat / flat.sum())
    w = (1 - flat) * (flat <= low)
    return fg, rng.choice(len(flat), n_bg, replace=False, p=w / w.sum())


def test_draws_agree_with_a_plain_loop_in_distribution():
    rng = np.random.default_rng(0)
    m = rng.random((6, 7)) ** 2
    n = 6000
    ours = draw_pixels(torch.tensor(m, dtype=torch.float32).expand(n, 6, 7), 3, 4, .5, 1, generator=torch.Generator().manual_seed(0))
    fg, bg = np.zeros(42), np.zeros(42)
    for _ in range(n):
        a, b = plain_draws(m, 3, 4, .5, rng)
        both = set(a) & set(b)
        fg[[i for i in a if i not in both]] += 1
        bg[[i for i in b if i not in both]] += 1
    assert np.abs((ours == 1).float().mean(0).numpy().ravel() - fg / n).max() < .03
    assert np.abs((ours == 0).float().mean(0).numpy().ravel() - bg / n).max() < .03
    assert not ((ours == 0).any(0).numpy() & (m > np.sort(m.ravel())[20])).any()      # only the lowest half gives background


def test_every_pixel_is_of_one_kind_and_counts_hold():
    m = torch.rand(16, 40, 50, generator=torch.Generator().manual_seed(1))
    out = draw_pixels(m, 5, 7, .3, 1, generator=torch.Generator().manual_seed(2))
    fg, bg = (out == 1).sum((1, 2)), (out == 0).sum((1, 2))
    assert set(out.unique().tolist()) == {-1, 0, 1} and (fg <= 5).all() and (bg <= 7).all() and (5 - fg == 7 - bg).all()      # what is missing was claimed by both
    assert (draw_pixels(m, 5, 7, 1., 5, foreground=torch.zeros(16, dtype=torch.bool)) != 1).all()


@pytest.mark.parametrize("name, options, level", [("small_cnn", {"depth": 3}, 4), ("resnet18", {"width": 8}, None), ("vgg16", {"width": 4, "hidden": 8}, 8), ("vit", {"size": 48, "patch": 8, "hidden": 24, "layers": 2}, None)])
def test_any_encoder_learns_from_perfect_seeds(name, options, level):
    if name in ("resnet18", "vit"): pytest.importorskip("monai")
    torch.set_num_threads(1)
    iset = discs(32, bright=.5)
    split = split_groups(iset.labels, iset.groups, seed=0)
    model = PixelCAM(build(name, 2, 2, **options), iset.shape, level)
    before = {k: v.clone() for k, v in model.classifier.state_dict().items()}
    run = train_pixelcam(model, iset, split, iset.load_masks(split.train)[:, 0].float(), ["none"], epochs=2, batch_size=8, lr=1e-3, n_foreground=20, n_background=20, progress=False)
    assert run.history.pixel_loss.iloc[-1] < run.history.pixel_loss.iloc[0] and set(run.states) == {"B-CL", "B-LOC"}
    assert any((before[k] != v).any() for k, v in model.classifier.state_dict().items())      # the encoder learns too
    maps = localise(model, iset, split.test)
    assert maps.shape == (len(split.test), 48, 48) and maps.min() >= 0 and maps.max() <= 1


class Own(nn.Module):
    "A user's network: nothing of it is known beforehand."
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.out = nn.Linear(16, 2)
    def forward(self, x): return self.out(self.body(self.stem(x)).mean((2, 3)))


def test_a_users_own_network():
    torch.manual_seed(0)
    net = Own()
    assert {s: n for s, (n, _) in feature_levels(net, (2, 48, 48)).items()} == {2: "stem", 4: "body"}
    x = torch.rand(3, 2, 48, 48)
    model = PixelCAM(net, (2, 48, 48), [2, 4]).eval()
    assert torch.equal(model(x), net(x)) and model.both(x)[1].shape == (3, 2, 48, 48)
    with torch.no_grad(): a, cam = net.body(net.stem(x)), None
    cam = torch.einsum("nchw,c->nhw", a, net.out.weight[1]).relu()
    got = seed_maps(net, x, 1, "CAM")
    want = nn.functional.interpolate(cam[:, None], (48, 48), mode="bilinear")[:, 0].detach().numpy()
    want = (want - want.min((1, 2), keepdims=True)) / np.ptp(want, (1, 2), keepdims=True) if (np.ptp(want, (1, 2)) > 0).all() else want
    assert np.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("seed, seed_level", [("CAM", None), ("LayerCAM", 4), ("PCIM", None)])
def test_pixelcam_beats_its_seed_on_planted_discs(toy, seed, seed_level):
    iset, split, net = toy
    before = {k: v.clone() for k, v in net.state_dict().items()}
    r = pixelcam_results(iset, split, {"seed": seed, "seed_level": seed_level, "level": [4, 2], "epochs": 6, "batch_size": 16, "lr": 1e-3, "without_foreground": ["none"]}, net, n_boot=100, progress=False)
    assert pxap(r.counts["PixelCAM"]) > pxap(r.counts[seed]) and pxap(r.counts["PixelCAM"]) > .5 > 5 * r.masks.mean()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())      # the seed model is left as it is
    t = r.table[(r.table["class"] == "all")].set_index(["method", "measure"]).value
    assert t["PixelCAM", "PxAP"] == pytest.approx(average_precision_score(r.masks.ravel(), r.maps.ravel()), abs=2e-3)
    assert t["PixelCAM", "CL"] == pytest.approx((predict(r.training.model, iset, split.test).argmax(1) == iset.labels[split.test]).mean())
    assert 0 <= r.thresholds["PixelCAM"] <= 1 and "PxAP" in r.summary()
    for fig in (localisation_overlays(r, iset), disagreement_maps(r, iset), localisation_curve(r.counts)): assert fig.axes


def test_seeds_without_information_teach_nothing(toy):
    iset, split, net = toy
    noise = np.random.default_rng(0).random((len(split.train), 48, 48)).astype(np.float32)
    run = train_pixelcam(PixelCAM(deepcopy(net), iset.shape, [4, 2]), iset, split, noise, epochs=4, batch_size=16, lr=1e-4, min_p=1., progress=False)
    maps = localise(run.model, iset, split.test)
    assert np.abs(maps - .5).mean() < .2      # undecided nearly everywhere, as it should be


def test_thresholds_come_from_validation_only(toy):
    iset, split, net = toy
    flipped = replace(iset, masks=np.array([iset.mask(i) if i not in set(split.test) else ~iset.mask(i) for i in range(len(iset))]))
    kw = dict(settings={"seed": "CAM", "seed_level": None, "level": 4, "epochs": 2, "batch_size": 16}, classifier=net, n_boot=20, progress=False)
    a, b = pixelcam_results(iset, split, **kw), pixelcam_results(flipped, split, **kw)
    assert a.thresholds == b.thresholds and np.array_equal(a.maps, b.maps) and pxap(a.counts["PixelCAM"]) != pxap(b.counts["PixelCAM"])      # nothing but the measures looks at test masks


def test_a_kept_model_and_kept_maps_come_back(toy, tmp_path):
    iset, split, net = toy
    mil = AttentionMIL(deepcopy(net), iset.shape, 2).eval()
    maps = stored_maps(tmp_path / "m.npz", {"a": 1}, lambda: seed_maps(mil, iset, 1, "AttentionMIL", idx=split.test))
    assert np.array_equal(maps, stored_maps(tmp_path / "m.npz", {"a": 1}, lambda: pytest.fail("made again")))
    model = PixelCAM(deepcopy(net), iset.shape, 4)
    model.classifier.built_as = net.built_as
    save_pixelcam(model, tmp_path)
    assert np.array_equal(localise(load_pixelcam(tmp_path)[0], iset, split.test), localise(model, iset, split.test))
    (tmp_path / "pixelcam.safetensors").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(PcimError, match="pixelcam.safetensors"): load_pixelcam(tmp_path)


def test_measures_at_the_edges():
    m = np.zeros((2, 8, 8), bool)
    m[0, :4] = True
    s = m.astype(np.float32)
    c = pixel_counts(s, m)
    assert pxap(c) == 1 and overlap(c, .5) == {"IoU": 1, "Dice": 1} and np.isnan(pxap(c.subset([1]))) and overlap(c, best_threshold(c))["Dice"] == 1
    assert pxap(pixel_counts(1 - s, m)) < .5
    for bad, says in ((s[:, :7], "as the maps"),):
        with pytest.raises(PcimError, match=says): pixel_counts(s, bad)
    with pytest.raises(PcimError, match="object pixel"): best_threshold(pixel_counts(s, m & False))


def fold(tmp_path, size=(16, 24)):
    "A fold as the authors lay it out, with a normal patch that has no mask."
    rng = np.random.default_rng(0)
    where = tmp_path / "folds" / "CAMELYON512" / "fold-0"
    (tmp_path / "c").mkdir()
    for part, ks in (("train", range(4)), ("valcl", (4, 5)), ("valpx", (5,)), ("test", (6, 7))):
        (where / part).mkdir(parents=True)
        lines = {"image_ids": [], "class_labels": [], "localization": [], "image_sizes": []}
        for k in ks:
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"c/p{k}.png")
            Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), ((0, size[0] - 4), (0, size[1] - 4)))).save(tmp_path / f"c/m{k}.png")
            lines["image_ids"].append(f"c/p{k}.png")
            lines["class_labels"].append(f"c/p{k}.png,{k % 2}")
            lines["localization"].append(f"c/p{k}.png,c/m{k}.png," if k % 2 else f"c/p{k}.png,,")
            lines["image_sizes"].append(f"c/p{k}.png,{size[1]},{size[0]}")
        for name, v in lines.items(): (where / part / f"{name}.txt").write_text("\n".join(v) + "\n")
    (where.parent / "encoding.yaml").write_text("{normal: 0, tumor: 1}\n")
    return where


def test_published_folds(tmp_path):
    where = fold(tmp_path)
    f = read_fold(where, tmp_path)
    assert f.images.classes == ["normal", "tumor"] and f.images.shape == (3, 16, 24) and len(f.images) == 8
    assert set(f.valpx) < set(f.valcl) and len(f.train) == 4 and len(f.split().test) == 2
    assert [int(f.images.mask(i).sum()) for i in range(4)] == [0, 16, 0, 16]


@pytest.mark.parametrize("what, says", [("image", "names c/p1.png"), ("mask", "names c/m1.png"), ("label", "label of c/p1.png is 'x'"), ("line", "no line for c/p1.png"), ("class", "class normal .0. has no image"), ("number", "not in encoding.yaml"), ("twice", "listed twice"), ("size", "mask")])
def test_faulty_folds(tmp_path, what, says):
    where = fold(tmp_path)
    labels, ids = where / "train" / "class_labels.txt", where / "train" / "image_ids.txt"
    if what == "image": (tmp_path / "c/p1.png").unlink()
    if what == "mask": (tmp_path / "c/m1.png").unlink()
    if what == "label": labels.write_text(labels.read_text().replace("p1.png,1", "p1.png,x"))
    if what == "line": labels.write_text("\n".join(v for v in labels.read_text().splitlines() if "p1.png" not in v))
    if what == "class": labels.write_text(labels.read_text().replace(",0", ",1"))
    if what == "number": labels.write_text(labels.read_text().replace("p1.png,1", "p1.png,7"))
    if what == "twice": ids.write_text(ids.read_text() + "c/p1.png\n")
    if what == "size": Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "c/m1.png")
    with pytest.raises(PcimError, match=says) as e: read_fold(where, tmp_path).images.check()
    assert "\n" not in str(e.value)


def test_hostile_input_gives_one_clear_error(toy):
    iset, split, net = toy
    good = np.random.default_rng(0).random((len(split.train), 48, 48)).astype(np.float32)
    nan = good.copy()
    nan[3, 0, 0] = np.nan
    model = PixelCAM(deepcopy(net), iset.shape)
    wrong = replace(iset, masks=np.zeros((len(iset), 1, 20, 20), bool))
    only = replace(iset, labels=np.ones(len(iset), int))
    for call, says in ((lambda: train_pixelcam(model, iset, split, nan, progress=False), "map 3 holds NaN"), (lambda: train_pixelcam(model, iset, split, good * 2, progress=False), r"scaled to \[0,1\]"),
                       (lambda: train_pixelcam(model, iset, split, good[:-1], progress=False), "one of the images' size"), (lambda: train_pixelcam(model, iset, split, good, min_p=0, progress=False), "min_p: found 0"),
                       (lambda: train_pixelcam(model, wrong, split, good, progress=False), "truth mask of 20×20"), (lambda: train_pixelcam(model, only, split, good, progress=False), "one class only"),
                       (lambda: train_pixelcam(model, iset, split, good, ["none", "disc"], progress=False), "every class"), (lambda: pixelcam_results(replace(iset, masks=None), split, {}, net), "no truth masks"),
                       (lambda: pixelcam_results(iset, split, {"epoch": 3}, net), "pixelcam.epoch: unknown field"), (lambda: pixelcam_results(iset, split, {}, lambda x: x), "torch module"), (lambda: PixelCAM(net, iset.shape, 64), "no features at stride 64")):
        with pytest.raises(PcimError, match=says) as e: call()
        assert "\n" not in str(e.value)


needs_glas = pytest.mark.skipif(data_root() is None or not (data_root() / "glas").is_dir(), reason="PCIM_DATA holds no GlaS")


@needs_glas
def test_glas_splits_patches_and_shifts():
    glas = open_dataset(load_spec("glas", ["images.resize=[96, 144]"]), data_root())
    one, split = official_split(glas, "split", ["testA"])
    assert (len(split.train) + len(split.val), len(split.test)) == (85, 60) and "8 groups" in split.note
    assert not set(glas.groups[split.val]) & set(glas.groups[split.train])
    patches = gland_patches(glas.subset(split.train[:12]), 24, 2)
    assert [patches.mask(i).any() for i in range(len(patches))] == (patches.labels == 1).tolist()
    few = glas.subset(split.test[:2])
    for name in ("stain", "blur"): assert (shifted(few, name).mask(0) == few.mask(0)).all() and np.abs(shifted(few, name).image(0) - few.image(0)).mean() > .005


@needs_glas
def test_glands_of_other_patients_from_perfect_seeds():
    "With the true masks as seeds the pixel head finds glands in patients it has not seen: the way from seeds to maps is sound on real images."
    pytest.importorskip("efficientnet_lite_pytorch")
    torch.set_num_threads(1)
    glas = open_dataset(load_spec("glas", ["images.resize=[96, 144]"]), data_root())
    split = split_groups(glas.labels, glas.groups, test=.3, val=.2, seed=0)
    seeds = glas.load_masks(split.train)[:, 0].float()
    run = train_pixelcam(PixelCAM(build("efficientnet_lite0", 3, 2), glas.shape, 8), glas, split, seeds, valpx=[], epochs=2, n_foreground=20, n_background=20, progress=False)
    c = pixel_counts(localise(run.model, glas, split.test), glas.load_masks(split.test))
    assert pxap(c) > c.share + .15
