"Feature measurement against cp_measure, CellProfiler's names, and hostile label images."
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from pcim_nb.datasets import data_root
from pcim_nb.images import ImageSet, PcimError
from pcim_nb import profiles
from pcim_nb.profiles import (FAMILIES, _granularity, _relabel, _rings, aggregate, central_object, clean, feature_columns, feature_table, measure, measure_image, normalise,
                              parents, parse_feature)
from pcim_nb.segment import segmented
from pcim_nb.simulate import simulate

FAST = dict(workers=1, progress=False)

def scene(seed, shape=(60, 70), channels=2, sigma=4):
    rng = np.random.default_rng(seed)
    image = np.clip(ndimage.gaussian_filter(rng.random((channels, *shape)), (0, 1, 1)), 0, 1)
    labels = ndimage.label(ndimage.gaussian_filter(rng.random(shape), sigma) > 0.5)[0].astype(np.int32)
    return image, labels

def iset(images, objects, channels=("DNA", "ER"), **kw):
    return ImageSet(np.asarray(images, np.float32), list(channels), np.zeros(len(images), int), ["control"], objects=objects, **kw)

@pytest.mark.parametrize("seed", range(8))
def test_rings_and_granularity_equal_cp_measure(seed):
    "Touching objects, objects in two parts, at the border, of one pixel; overlapping compartments; odd sizes; empty channels."
    from cp_measure.core.measuregranularity import get_granularity
    from cp_measure.core.measureobjectintensitydistribution import get_radial_distribution
    rng = np.random.default_rng(100 + seed)
    shape = tuple(rng.integers(20, 110, 2)) if seed else (160, 96)
    image, labels = scene(seed, shape, sigma=[1, 2, 4][seed % 3])
    labels = np.where(labels == 2, 1, labels) if seed % 2 else np.where(labels > 0, 1 + (np.indices(shape)[1] > shape[1] // 2), 0)
    labels, _ = _relabel(labels)
    if seed == 5: image[1] = 0
    other = (np.indices(shape)[0] // 25).astype(np.int32)
    params = [{}, {"subsample_size": 0.5, "element_size": 4}, {"subsample_size": 1, "image_sample_size": 1, "granular_spectrum_length": 5}][seed % 3]
    grains = _granularity(image, {"a": labels, "b": other}, **params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with np.errstate(all="ignore"):
            for c in range(2):
                mine, theirs = _rings(labels)(image[c]), get_radial_distribution(labels, image[c])
                assert mine.keys() == theirs.keys()
                for k in theirs: np.testing.assert_allclose(mine[k], theirs[k], rtol=1e-9, atol=1e-12, err_msg=k)
                for name, lab in (("a", labels), ("b", other)):
                    theirs = get_granularity(lab, image[c], **params)
                    assert grains[name][c].keys() == theirs.keys()
                    for k in theirs: np.testing.assert_allclose(grains[name][c][k], theirs[k], rtol=1e-9, atol=1e-9, err_msg=k)

def test_all_other_families_equal_cp_measure():
    from cp_measure.bulk import get_core_measurements, get_correlation_measurements
    image, labels = scene(3)
    got = measure_image(image, {"Cells": labels}, ["DNA", "ER"], FAMILIES)["Cells"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        core, pairs = get_core_measurements(legacy=True), get_correlation_measurements()
        for fam in ("sizeshape", "feret", "zernike"):
            for k, v in core[fam](labels, None).items():
                if f"Cells_AreaShape_{k}" in got: np.testing.assert_allclose(got[f"Cells_AreaShape_{k}"], v, rtol=1e-9, err_msg=k)
        for c, ch in enumerate(("DNA", "ER")):
            for k, v in core["radial_zernikes"](labels, image[c]).items():
                a, b, *rest = k.split("_")
                if "Phase" not in k: np.testing.assert_allclose(got["_".join(["Cells", a, b, ch, *rest])], v, rtol=1e-9)
            for k, v in core["texture"](labels, image[c]).items():
                a, *rest = k.split("_")
                np.testing.assert_allclose(got["_".join(["Cells_Texture", a, ch, *rest])], v, rtol=2e-5, atol=1e-7)
        rwc = pairs["rwc"](image[0], image[1], labels)
        np.testing.assert_allclose(got["Cells_Correlation_RWC_DNA_ER"], rwc["Correlation_RWC_1"])
        np.testing.assert_allclose(got["Cells_Correlation_RWC_ER_DNA"], rwc["Correlation_RWC_2"])
        swapped = pairs["rwc"](image[1], image[0], labels)
        np.testing.assert_allclose(got["Cells_Correlation_RWC_ER_DNA"], swapped["Correlation_RWC_1"])
        costes = pairs["costes"](image[0], image[1], labels, scale_max=65535)
        np.testing.assert_allclose(got["Cells_Correlation_Costes_ER_DNA"], costes["Correlation_Costes_2"])
    for i in got.index:  # Manders and overlap by their definitions
        a, b = image[0][labels == i], image[1][labels == i]
        ta, tb = a >= 0.15 * a.max(), b >= 0.15 * b.max()
        np.testing.assert_allclose(got.loc[i, "Cells_Correlation_Manders_DNA_ER"], a[ta & tb].sum() / a[ta].sum())
        np.testing.assert_allclose(got.loc[i, "Cells_Correlation_K_ER_DNA"], (a * b)[ta & tb].sum() / (b[ta & tb] ** 2).sum())

def test_every_name_is_parsed_and_has_one_place():
    image, labels = scene(1, channels=3)
    names = list(measure_image(image, {"PLA_dots": labels}, ["a b", "c_d", "Ω"], FAMILIES)["PLA_dots"])
    t = feature_table(names, ["a b", "c_d", "Ω"])
    assert len(set(names)) == len(names) and set(t.compartment) == {"PLA_dots"} and "Other" not in set(t.family)
    assert set(t.channel.dropna()) == {"a b", "c_d", "Ω"} and (t[t.channel_2.notna()].family == "Correlation").all()
    assert set(t[t.channel.isna()].family) == {"AreaShape", "Neighbors"}
    sizes = t[t.channel_2.isna() & t.channel.notna()].groupby("channel").size()
    assert sizes.nunique() == 1

def test_ids_with_gaps_and_huge_ids_stay():
    image, labels = scene(2)
    ids = np.unique(labels)[1:]
    big = np.zeros_like(labels)
    for k, i in enumerate(ids): big[labels == i] = 10 ** 6 * (len(ids) - k)
    a = measure_image(image, {"Cells": labels}, ["DNA", "ER"])["Cells"]
    b = measure_image(image, {"Cells": big}, ["DNA", "ER"])["Cells"]
    assert b.index.tolist() == sorted(10 ** 6 * (k + 1) for k in range(len(ids)))
    np.testing.assert_allclose(a.to_numpy(), b.to_numpy()[::-1], rtol=1e-9, atol=1e-9)

def test_workers_chunks_and_order_change_nothing(tmp_path):
    parts = [scene(s, (96, 96)) for s in range(20)]
    s = iset([p[0] for p in parts], {"Cells": np.stack([p[1] for p in parts]), "Nuclei": np.stack([ndimage.binary_erosion(p[1] > 0, iterations=3) * p[1] for p in parts])})
    kw = dict(families=("intensity", "radial", "granularity"), progress=False)
    one, two = measure(s, workers=1, **kw), measure(s, workers=2, cache_dir=tmp_path / "größe", **kw)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    pd.testing.assert_frame_equal(one, measure(s, workers=2, cache_dir=tmp_path / "größe", **kw), check_exact=True)
    back = measure(s, list(range(19, -1, -1)), workers=1, **kw)
    assert back.Metadata_ImageIndex.is_monotonic_decreasing
    pd.testing.assert_frame_equal(one, back.sort_values(["Metadata_ImageIndex", "Metadata_ObjectNumber"], ignore_index=True), check_exact=True)
    assert not list((tmp_path / "größe").glob("*.part"))

class Breaks:
    "Images of which one cannot be read."
    def __init__(self, images, bad): self.images, self.bad = images, bad
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        if i == self.bad: raise PcimError("image 25: unreadable")
        return self.images[i]

@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_keeps_what_it_has(tmp_path, workers):
    parts = [scene(s, (96, 96)) for s in range(34)]
    s = iset([p[0] for p in parts], {"Cells": np.stack([p[1] for p in parts])})
    whole = measure(s, families=("intensity",), **FAST)
    s.images = Breaks(s.images, 33)
    with pytest.raises(PcimError, match="unreadable"): measure(s, families=("intensity",), progress=False, workers=workers, cache_dir=tmp_path)
    assert all(pd.read_parquet(p).shape[0] for p in tmp_path.iterdir())
    if workers == 1: assert len(list(tmp_path.iterdir())) == 2
    s.images.bad = None
    pd.testing.assert_frame_equal(measure(s, families=("intensity",), cache_dir=tmp_path, **FAST), whole, check_exact=True)

def test_the_cache_sees_every_change(tmp_path):
    image, labels = scene(0)
    def entries(img=image, lab=labels, channels=("DNA", "ER"), **kw):
        measure(iset([img], {"Cells": lab[None]}, channels), cache_dir=tmp_path, **{"families": ("granularity",), **FAST, **kw})
        return len(list(tmp_path.iterdir()))
    assert entries() == 1 == entries()
    changed, moved = image.copy(), labels.copy()
    changed[0, 5, 5] = 1 - changed[0, 5, 5]
    moved[0, 0] = labels.max() + 1
    assert entries(changed) == 2 and entries(lab=moved) == 3 and entries(channels=("DNA", "RNA")) == 4
    assert entries(families=("shape",)) == 5 and entries(params={"granularity": {"subsample_size": 0.5}}) == 6
    assert entries(objects="center") == 7  # one object is left in the label image
    assert entries() == 7

@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_run_computes_nothing(tmp_path, monkeypatch, workers):
    parts = [scene(s, (96, 96)) for s in range(40)]
    s = iset([p[0] for p in parts], {"Cells": np.stack([p[1] for p in parts])})
    kw = dict(families=("intensity", "neighbours", "children"), progress=False, workers=workers, cache_dir=tmp_path)
    first = measure(s, **kw)
    def never(*a, **k): raise AssertionError("measured again")
    for name in ("_rows", "measure_image"): monkeypatch.setattr(profiles, name, never)
    pd.testing.assert_frame_equal(measure(s, **kw), first, check_exact=True)
    s.images[7, 0, 3, 3] += 0.01
    with pytest.raises(AssertionError, match="measured again"): measure(s, **(kw | {"workers": 1}))

@pytest.mark.parametrize("seed", range(6))
def test_neighbours_by_plain_loops(seed):
    "Touching by dilation with a cross, distances between centres; ids with gaps; one, two or many objects."
    rng = np.random.default_rng(seed)
    n = [1, 2, 3, 8, 15, 30][seed]
    seeds = np.zeros((60, 70), int)
    seeds.ravel()[rng.choice(seeds.size, n, replace=False)] = rng.choice(np.arange(1, 200), n, replace=False)
    _, at = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    labels = np.where(ndimage.distance_transform_edt(seeds == 0) < 9, seeds[tuple(at)], 0)
    t = measure_image(np.zeros((1, 60, 70)), {"Cells": labels}, ["DNA"], ("neighbours",))["Cells"].rename(columns=lambda c: c.split("_")[2])
    ids = t.index.to_numpy()
    centre = np.array(ndimage.center_of_mass(labels > 0, labels, ids))
    for k, i in enumerate(ids):
        ring = labels[ndimage.binary_dilation(labels == i)]
        assert t.NumberOfNeighbors[i] == len(set(ring) - {0, i})
        d = np.sort(np.hypot(*(centre - centre[k]).T))[1:]
        for name, j in (("FirstClosestDistance", 0), ("SecondClosestDistance", 1)):
            assert np.isnan(t[name][i]) if j >= len(d) else t[name][i] == pytest.approx(d[j])
        assert (t.PercentTouching[i] > 0) == (t.NumberOfNeighbors[i] > 0) and t.PercentTouching[i] <= 100

def test_neighbours_and_children_of_one_object_see_the_others():
    image, labels = scene(5)
    dots = ndimage.label(image[0] > np.quantile(image[0], 0.97))[0].astype(np.int32)
    field = iset([image], {"Cells": labels[None], "Nuclei": (labels * ndimage.binary_erosion(labels > 0, iterations=2))[None], "Dots": dots[None]})
    kw = dict(families=("shape", "neighbours", "children"), **FAST)
    whole, one = measure(field, **kw), measure(field, objects="center", **kw)
    assert len(one) == 1 and "Dots_AreaShape_Area" not in one
    same = whole[(whole.Metadata_Object == "Cell") & (whole.Metadata_ObjectNumber == one.Metadata_ObjectNumber[0])].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, same[one.columns], rtol=1e-9)
    assert whole.Cells_Children_Dots_Count.sum() == (whole.Dots_Parent_Cells > 0).sum() > 0
    assert not any("Neighbors" in c for c in measure(field, objects="center", **FAST)) and any("Neighbors" in c for c in measure(field, **FAST))
    assert not {c for c in feature_columns(whole) if "Parent" in c}

def test_parents_by_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(5):
        cells, dots = (np.kron(rng.integers(0, 5, (6, 6)), np.ones((k, k), int)) for k in (4, 4))
        dots = np.roll(ndimage.label(dots == 3)[0], 2, 1)
        p = parents(dots, cells)
        for d in p.index:
            inside = cells[dots == d]
            counts = np.bincount(inside[inside > 0], minlength=1)
            assert p[d] == (counts.argmax() if counts.sum() else 0)
    assert len(parents(np.zeros((4, 4), int), cells[:4, :4])) == 0

def test_sets_without_label_images_are_segmented_and_measured():
    demo = simulate(["er_intensity"], n_plates=1, wells_per_class=1, cells_per_well=2, seed=0)
    bare = ImageSet(demo.load().numpy(), demo.channels, demo.labels, demo.classes, demo.meta, demo.group, demo.unit)
    t = measure(segmented(bare, "DNA", "RNA", centred=True), objects="center", families=("shape", "intensity"), **FAST)
    truth = measure(demo, objects="center", families=("shape",), **FAST)
    assert len(t) == len(truth)
    assert np.median(np.abs(t.Nuclei_AreaShape_Area / truth.Nuclei_AreaShape_Area - 1)) < 0.2

def test_border_one_pixel_and_empty_images():
    labels = np.zeros((3, 32, 32), np.int32)
    labels[0, 0:6, 0:6], labels[0, 20, 20], labels[1, 4, 4] = 1, 2, 5
    t = measure(iset(np.random.default_rng(0).random((3, 2, 32, 32)), {"Worms": labels}), families=FAMILIES, **FAST)
    assert t.Metadata_TouchesBorder.tolist() == [True, False, False] and t.Worms_AreaShape_Area.tolist() == [36, 1, 1]
    assert t.Worms_Intensity_MeanIntensity_DNA.notna().all() and t.Worms_Texture_Contrast_DNA_3_00_256.notna().tolist() == [True, False, False]
    assert any("1 of 3 images hold no object" in n for n in t.attrs["notes"]) and any("1 of 3 objects (Worms) touch the image border" in n for n in t.attrs["notes"])

def test_crops_measure_the_object_they_are_about():
    image, labels = scene(7, (160, 160), sigma=3)
    field = iset([image], {"Cells": labels[None]})
    crops = field.crops("Cells", 96)
    t = measure(crops, objects="center", families=("shape", "intensity"), **FAST)
    assert t.Metadata_ObjectNumber.tolist() == crops.meta.Metadata_ObjectNumber.tolist() and len(t) == labels.max()
    whole = measure(field, families=("shape", "intensity"), **FAST)
    inner = whole.index[~whole.Metadata_TouchesBorder & ~t.Metadata_TouchesBorder].tolist()
    assert len(inner) > 1
    for c in feature_columns(whole): np.testing.assert_allclose(t.loc[inner, c], whole.loc[inner, c], rtol=1e-5, err_msg=c)

def test_central_object_is_the_nearest():
    lab = np.zeros((9, 9), int)
    lab[0, 0], lab[6, 6] = 3, 5
    assert central_object({"a": lab * 0, "b": lab}) == 5 and central_object({"a": lab * 0}) == 0

def test_spots_and_cells_in_one_table():
    image, labels = scene(4)
    dots = ndimage.label(image[0] > np.quantile(image[0], 0.98))[0].astype(np.int32)
    t = measure(iset([image], {"PLA_dots": dots[None], "Nuclei": labels[None], "Cells": labels[None]}), families=("shape",), **FAST)
    kinds = t.Metadata_Object.value_counts()
    assert kinds["Cell"] == labels.max() and kinds["PLA_dots"] == dots.max()
    assert t[t.Metadata_Object == "Cell"].PLA_dots_AreaShape_Area.isna().all()
    kept, dropped = clean(t)
    assert "Cells_AreaShape_Area" in kept and "PLA_dots_AreaShape_Area" in kept  # missing in the other kind is not missing
    unit = aggregate(kept)
    assert len(unit) == 1 and unit.Cells_AreaShape_Area[0] == pytest.approx(np.bincount(labels.ravel())[1:].mean())

@pytest.mark.parametrize("spoil, message", [
    (lambda s: s.objects.clear(), "no object label images"),
    (lambda s: s.objects.update(Cells=np.full((2, 60, 70), -1)), "negative"),
    (lambda s: s.objects.update(Cells=np.zeros((2, 60, 70), int)), "hold no object"),
    (lambda s: s.objects.update(Cells=np.zeros((2, 60, 71), int)), "60×71"),
    (lambda s: s.channels.__setitem__(1, "DNA"), "not unique")])
def test_bad_sets_are_refused(spoil, message):
    image, labels = scene(0)
    s = iset([image, image], {"Cells": np.stack([labels, labels])})
    spoil(s)
    with pytest.raises(PcimError, match=message): measure(s, **FAST)

@pytest.mark.parametrize("kw, message", [(dict(families=()), "none given"), (dict(families=("texture", "odour")), "odour"), (dict(compartments=["Golgi"]), "Golgi"), (dict(objects="some"), "some"),
                                         (dict(idx=[]), "no images"), (dict(params={"odour": {}}), "odour")])
def test_bad_arguments_are_refused(kw, message):
    image, labels = scene(0)
    with pytest.raises(PcimError, match=message): measure(iset([image], {"Cells": labels[None]}), **FAST, **kw)

def test_clean_aggregate_normalise_by_hand():
    rng = np.random.default_rng(0)
    t = pd.DataFrame({"Metadata_Unit": np.repeat(["P/1", "P/2", "Q/1", "Q/2"], 5), "Metadata_Plate": np.repeat(["P", "Q"], 10), "Metadata_Class": np.tile(np.repeat(["c", "t"], 5), 2),
                      "Cells_Intensity_A_DNA": rng.normal(size=20), "Cells_Intensity_B_DNA": [np.inf] * 3 + [1.0, 2.0] * 8 + [1.0], "Cells_Intensity_C_DNA": 1e6 + 1e-9 * rng.normal(size=20)})
    kept, dropped = clean(t)
    assert dict(zip(dropped.feature, dropped.reason)) == {"Cells_Intensity_B_DNA": "missing in 15% of objects", "Cells_Intensity_C_DNA": "constant"}
    assert clean(t, max_missing=0.2)[1].feature.tolist() == ["Cells_Intensity_C_DNA"]
    med = aggregate(kept, how="median")
    assert med.Cells_Intensity_A_DNA.tolist() == t.groupby("Metadata_Unit").Cells_Intensity_A_DNA.median().tolist() and med.Metadata_Plate.tolist() == list("PPQQ")
    z = normalise(kept, "c", method="robust")
    for _, g in t.groupby("Metadata_Plate"):
        c = g[g.Metadata_Class == "c"].Cells_Intensity_A_DNA
        expected = (g.Cells_Intensity_A_DNA - c.median()) / (1.4826 * (c - c.median()).abs().median())
        np.testing.assert_allclose(z.loc[g.index, "Cells_Intensity_A_DNA"], expected)
    mixed = t.assign(Metadata_Unit="P/1")  # a unit that holds both classes stays two rows
    assert aggregate(mixed).Metadata_Class.tolist() == ["c", "t"]

def test_names_of_a_real_cellprofiler_table():
    root = data_root()
    if root is None or not (root / "cellpainting_field").exists(): pytest.skip("PCIM_DATA does not point to the real data sets")
    columns = pd.read_parquet(Path(root) / "cellpainting_field" / "BR00143976_shrunken.parquet").columns
    stains = [f"Corr{c}" for c in ("AGP", "Brightfield", "Brightfild", "Brightfld", "DNA", "ER", "Mito", "RNA")]  # CellProfiler shortens names of over 64 letters
    for c in (c for c in columns if c.startswith(("Cells_", "Nuclei_", "Cytoplasm_"))):
        f = parse_feature(c, stains)
        assert set(f.channels) <= set(stains) and ("Corr" in c) == bool(f.channels), c
