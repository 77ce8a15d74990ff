"CellProfiler's own tables: three formats, joins, hostile files, and real ones; and what is joined with them."
import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from pcim_nb.cellprofiler import CellProfilerTables, fill_outlines, full_names, is_cellprofiler, locate, match, read_cellprofiler, shortened
from pcim_nb.cytominer import well_profiles, write_profiles
from pcim_nb.datasets import data_root, load_spec, open_dataset
from pcim_nb.images import ImageSet, PcimError
from pcim_nb.object_attribution import KEYS, attribution_by_object
from pcim_nb.profiles import JOINED, aggregate, clean, feature_columns, measure, measure_image
from pcim_nb.simulate import simulate

@pytest.fixture
def real():
    root = data_root()
    if root is None: pytest.skip("PCIM_DATA does not point to the real data sets")
    return root

def experiment(seed=0, images=3):
    "Tables as CellProfiler makes them: nuclei, of which some have no cell; cells numbered anew; cytoplasm of each; spots."
    rng = np.random.default_rng(seed)
    tables = {k: [] for k in ("Nuclei", "Cells", "Cytoplasm", "Spots")}
    for i in range(1, images + 1):
        nuclei = rng.permutation(np.arange(1, 9))
        kept = nuclei[:6]
        tables["Nuclei"].append(pd.DataFrame({"ImageNumber": i, "ObjectNumber": np.arange(1, 9), "AreaShape_Area": 10.0 * i + np.arange(1, 9)}))
        tables["Cells"].append(pd.DataFrame({"ImageNumber": i, "ObjectNumber": np.arange(1, 7), "AreaShape_Area": 100.0 * i + kept, "Parent_Nuclei": kept, "Intensity_MeanIntensity_DNA": rng.random(6)}))
        tables["Cytoplasm"].append(pd.DataFrame({"ImageNumber": i, "ObjectNumber": np.arange(1, 7), "AreaShape_Area": 100.0 * i + kept - 10.0 * i - kept, "Parent_Nuclei": kept}))
        tables["Spots"].append(pd.DataFrame({"ImageNumber": i, "ObjectNumber": np.arange(1, 4), "AreaShape_Area": rng.random(3), "Parent_Cells": [1, 1, 0]}))
    image = pd.DataFrame({"ImageNumber": range(1, images + 1), "FileName_DNA": [f"é {i}.tif" for i in range(1, images + 1)], "PathName_DNA": "/cluster/run 7/images",
                          "Metadata_Plate": "0042", "Metadata_Well": [f"A0{i}" for i in range(1, images + 1)]})
    return {k: pd.concat(v, ignore_index=True) for k, v in tables.items()}, image

def to_csv(folder, tables, image, prefix="", sep=","):
    folder.mkdir(parents=True, exist_ok=True)
    suffix = {",": "csv", "\t": "txt"}[sep]
    for k, t in {**tables, "Image": image}.items(): t.sample(frac=1, random_state=1).to_csv(folder / f"{prefix}{k}.{suffix}", index=False, sep=sep)
    return folder

def wide(k, t): return t.rename(columns={c: c if c == "ImageNumber" else f"{k}_Number_Object_Number" if c == "ObjectNumber" else f"{k}_{c}" for c in t})

def to_sqlite(path, tables, image, prefix=""):
    with closing(sqlite3.connect(path)) as db:
        for k, t in tables.items(): wide(k, t).to_sql(f"{prefix}Per_{k}", db, index=False)
        image.rename(columns=lambda c: c if c == "ImageNumber" else f"Image_{c}").to_sql(f"{prefix}Per_Image", db, index=False)
    return path

def ordered(t): return t.sort_values(["Metadata_Object", "Metadata_ImageNumber", "Metadata_ObjectNumber"], ignore_index=True)

def test_every_format_gives_the_same_table(tmp_path):
    tables, image = experiment()
    first = read_cellprofiler(to_csv(tmp_path / "a", tables, image))
    reads = [read_cellprofiler(to_csv(tmp_path / "b größe", tables, image, "My Expt_", "\t")), read_cellprofiler(to_sqlite(tmp_path / "c.db", tables, image, "x_"))]
    for other in reads:
        shared = [c for c in first.profiles if c in other.profiles]
        assert len(shared) > 10 and set(feature_columns(first.profiles)) == set(feature_columns(other.profiles))
        pd.testing.assert_frame_equal(ordered(first.profiles[shared]), ordered(other.profiles[shared]), check_dtype=False)
        assert sorted(first.notes) == sorted(other.notes)
    cell = first.profiles[first.profiles.Metadata_Object == "Cell"]
    assert len(cell) == 18 and set(cell.Metadata_Plate) == {"0042"}
    np.testing.assert_allclose(cell.Cells_AreaShape_Area - cell.Nuclei_AreaShape_Area, cell.Cytoplasm_AreaShape_Area)  # breaks if cells were mixed
    assert any(n.startswith("6 of 24 Nuclei belong to no Cells") for n in first.notes)

def test_one_table_for_all_objects(tmp_path):
    "ExportToDatabase's Per_Object, and ExportToSpreadsheet's single file with two header lines."
    tables, image = experiment()
    same = {k: t.drop(columns="Parent_Nuclei", errors="ignore") for k, t in tables.items() if k in ("Cells", "Cytoplasm")}
    joined = wide("Cells", same["Cells"]).merge(wide("Cytoplasm", same["Cytoplasm"]), left_on=["ImageNumber", "Cells_Number_Object_Number"], right_on=["ImageNumber", "Cytoplasm_Number_Object_Number"])
    with closing(sqlite3.connect(tmp_path / "o.sqlite")) as db:
        joined.assign(ObjectNumber=joined.Cells_Number_Object_Number).to_sql("Per_Object", db, index=False)
        image.to_sql("Per_Image", db, index=False)
    r = read_cellprofiler(tmp_path / "o.sqlite")
    assert len(r.profiles) == 18 and {"Cells_AreaShape_Area", "Cytoplasm_AreaShape_Area"} <= set(r.profiles) and any("joined by their numbers" in n for n in r.notes)
    flat = joined.merge(image, on="ImageNumber")
    owner = ["Image" if c in image else c.split("_")[0] for c in flat]
    rest = [c if c in image else c.split("_", 1)[1] for c in flat]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "all.csv").write_text("\n".join([",".join(owner), ",".join(rest), *(",".join(map(str, row)) for row in flat.itertuples(index=False))]), encoding="utf-8")
    two = read_cellprofiler(tmp_path / "two")
    assert two.profiles.Cells_AreaShape_Area.tolist() == r.profiles.Cells_AreaShape_Area.tolist() and two.images.Metadata_Well.tolist() == ["A01", "A02", "A03"]

def test_cytotable_parquet(tmp_path):
    tables, image = experiment()
    r = read_cellprofiler(to_csv(tmp_path / "a", tables, image))
    cell = r.profiles[r.profiles.Metadata_Object == "Cell"]
    long = "Cells_RadialDistribution_ZernikeMagnitude_CorrMitochondria_CorrDNA_9_9"
    table = cell[feature_columns(cell)].assign(**{shortened(long): 1.5, "Cells_Intensity_MeanIntensity_CorrMitochondria": 0.5, "Cells_RadialDistribution_ZernikeMagnitude_CorrDNA_9_9": 1.0})
    table = table.assign(Metadata_ImageNumber=cell.Metadata_ImageNumber, Metadata_Cells_Number_Object_Number=cell.Metadata_ObjectNumber, Image_Metadata_Well=cell.Metadata_Well, Image_FileName_DNA="a.tif")
    table.to_parquet(tmp_path / "single_cells.parquet")
    p = read_cellprofiler(tmp_path / "single_cells.parquet")
    assert is_cellprofiler(tmp_path / "single_cells.parquet") and long in p.profiles and any("restored" in n for n in p.notes)
    assert p.profiles.Metadata_Well.tolist() == cell.Metadata_Well.tolist() and p.profiles.Cells_AreaShape_Area.tolist() == cell.Cells_AreaShape_Area.tolist()
    assert set(p.profiles.Metadata_Object) == {"Cell"} and p.images.Image_FileName_DNA.tolist() == ["a.tif"] * 3

def test_names_lose_letters_as_the_database_takes_them():
    rng = np.random.default_rng(0)
    for _ in range(200):
        name = "Nuclei_" + "".join(rng.choice(list("aeioubcdXYZ_019"), rng.integers(40, 70)))
        s = shortened(name)
        assert s == name if len(name) <= 64 else len(s) == 64
        assert s.startswith("Nuclei_")
        lost = sorted(set(name) - set(s))
        if any(c in "bcd" for c in lost): assert not set(s[7:]) & set("aeiou")  # consonants only when the vowels are gone
    assert shortened("Nuclei_" + "x" * 40 + "aeiou" * 5).endswith("xaeiouaeiouaeiouae") and full_names(["Cells_" + "x" * 58]) == {}
    twins = [f"Cells_{'y' * 52}_{w}" for w in ("0_Cubeea", "0_Cubeae")]  # two words that become the same: left as it is
    assert len({shortened(t) for t in twins}) == 1 and full_names(["A_Cubeea", "A_Cubeae", f"A_{'y' * 52}", shortened(twins[0])]) == {}
    assert full_names(["A_Cubeea", f"A_{'y' * 52}", shortened(twins[0])]) == {shortened(twins[0]): twins[0]}

def test_the_database_is_only_read(tmp_path):
    path = to_sqlite(tmp_path / "x.sqlite", *experiment())
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.chmod(0o444)
    read_cellprofiler(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before and {p.name for p in tmp_path.iterdir()} == {"x.sqlite"}

def broken(tmp_path, kind):
    tables, image = experiment()
    if kind == "cut": (p := to_sqlite(tmp_path / "x.sqlite", tables, image)).write_bytes(p.read_bytes()[:5000]); return p
    if kind == "empty": (tmp_path / "x.sqlite").touch(); return tmp_path / "x.sqlite"
    if kind == "only images": return to_sqlite(tmp_path / "x.sqlite", {}, image)
    if kind == "numbers": return to_csv(tmp_path / "x", {"Cells": tables["Cells"].drop(columns="Parent_Nuclei"), "Nuclei": tables["Nuclei"]}, image)
    if kind == "parents": return to_csv(tmp_path / "x", {**tables, "Cells": tables["Cells"].assign(Parent_Nuclei=99)}, image)
    if kind == "twice": return to_csv(tmp_path / "x", {"Cells": pd.concat([tables["Cells"]] * 2)}, image)
    if kind == "images": return to_csv(tmp_path / "x", {"Cells": tables["Cells"]}, image.assign(ImageNumber=image.ImageNumber + 50))
    if kind == "hollow": return to_csv(tmp_path / "x", {"Cells": tables["Cells"][["ImageNumber", "ObjectNumber"]].assign(AreaShape_Area=np.nan, Texture_Contrast_DNA_3_00_256=np.inf)}, image)
    if kind == "no rows": return to_csv(tmp_path / "x", {"Cells": tables["Cells"][:0]}, image)
    if kind == "no number": return to_csv(tmp_path / "x", {"Cells": tables["Cells"]}, image.drop(columns="ImageNumber"))
    if kind == "nothing": (tmp_path / "x").mkdir(); return tmp_path / "x"
    if kind == "parquet": (tmp_path / "x.parquet").write_bytes(b"PAR1 no"); return tmp_path / "x.parquet"
    if kind == "bytes": (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00ImageNumber"); return tmp_path / "x.csv"
    if kind == "clash":
        to_csv(tmp_path / "x", {"A_Cells": tables["Cells"], "B_Cells": tables["Cells"].assign(AreaShape_Area=1.0)}, image)
        return tmp_path / "x"

@pytest.mark.parametrize("kind, message", [
    ("cut", "x.sqlite"), ("empty", "not a CellProfiler database"), ("only images", "no table of objects"), ("numbers", "do not join"), ("parents", "do not join"), ("twice", "twice"), ("images", "do not join"),
    ("hollow", "has a value for any object"), ("no rows", "hold no object"), ("no number", "no column ImageNumber"), ("nothing", "no CellProfiler spreadsheet"), ("parquet", "not a readable parquet"),
    ("bytes", "cannot be read"), ("clash", "different AreaShape_Area")])
def test_bad_tables_are_refused_with_a_reason(tmp_path, kind, message):
    with pytest.raises(PcimError, match=message) as e: read_cellprofiler(broken(tmp_path, kind))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)

def test_partly_missing_is_counted_and_named(tmp_path):
    tables, image = experiment()
    tables["Cells"] = tables["Cells"].assign(Texture_Contrast_DNA_3_00_256=np.nan, Location_Note="left")
    r = read_cellprofiler(to_csv(tmp_path / "x", tables, image[:2]))
    assert any("belong to images that the image table lacks (ImageNumber 3)" in n and n.startswith("6 of 18 Cells") for n in r.notes)
    assert any("Cells_Texture_Contrast_DNA_3_00_256" in n for n in r.notes) and any("Cells_Location_Note" in n for n in r.notes) and "Cells_Location_Note" not in r.profiles

def test_nuclei_that_share_a_cell_keep_their_rows(tmp_path):
    tables, image = experiment(images=1)
    tables = {"Cells": tables["Cells"].drop(columns="Parent_Nuclei"), "Nuclei": tables["Nuclei"].assign(Parent_Cells=[1, 1, 2, 3, 4, 5, 6, 0])}
    r = read_cellprofiler(to_csv(tmp_path / "x", tables, image))
    assert r.profiles.Metadata_Object.value_counts().to_dict() == {"Nuclei": 8, "Cells": 6}
    assert any("share a cell" in n for n in r.notes)

def test_paths_of_another_machine(tmp_path):
    images = pd.DataFrame({"Metadata_ImageNumber": [1, 2], "Image_FileName_DNA": ["a.tif", "a.tif"], "Image_PathName_DNA": ["D:\\scan\\plate1", "file:/D:/scan/plate2"]})
    for p in ("plate1", "plate2"): (tmp_path / p).mkdir(); (tmp_path / p / "a.tif").touch()
    expected = [str(tmp_path / p / "a.tif") for p in ("plate1", "plate2")]
    assert locate(images, root=tmp_path)[0].Image_File_DNA.tolist() == expected
    assert locate(images, folders={"D:\\scan": tmp_path})[0].Image_File_DNA.tolist() == expected
    assert locate(images, folders={"D:\\scan": tmp_path, "D:/scan/plate2": tmp_path / "plate1"})[0].Image_File_DNA.tolist() == [expected[0]] * 2
    (tmp_path / "plate2" / "a.tif").unlink()
    found, notes = locate(images, root=tmp_path)
    assert found.Image_File_DNA.tolist() == [expected[0], ""] and "1 of 2 files of DNA" in notes[0]

@pytest.mark.parametrize("seed", range(4))
def test_outlines_are_filled(seed):
    from skimage.segmentation import find_boundaries
    rng = np.random.default_rng(seed)
    truth = ndimage.label(ndimage.gaussian_filter(rng.random((120, 140)), 5) > 0.505)[0]
    truth[:, 70] = np.where(truth[:, 70] > 0, truth[:, 70], 0)
    truth = np.where((np.indices(truth.shape)[1] > 70) & (truth > 0), truth + 100, truth)  # some objects cut in two that touch
    truth = truth * ~np.isin(truth, np.flatnonzero(np.bincount(truth.ravel()) < 60))
    line = find_boundaries(truth, mode="inner") & (truth > 0)
    got = fill_outlines(line)
    hit = [np.bincount(got[truth == k]).argmax() for k in np.unique(truth)[1:]]
    iou = [((got == g) & (truth == k)).sum() / ((got == g) | (truth == k)).sum() for g, k in zip(hit, np.unique(truth)[1:])]
    assert len(set(hit)) == len(hit) and np.median(iou) > 0.98

def matched(seed=0, centres=True):
    "A set of two fields, CellProfiler's tables of them, and a label image with other numbers."
    rng = np.random.default_rng(seed)
    labels = np.stack([ndimage.label(ndimage.gaussian_filter(rng.random((80, 90)), 4) > 0.51)[0] for _ in range(2)])
    rows = []
    for i, lab in enumerate(labels, 1):
        ids = np.unique(lab)[1:]
        c = np.array(ndimage.center_of_mass(lab > 0, lab, ids))
        rows.append(pd.DataFrame({"Metadata_ImageNumber": i, "Metadata_Object": "Cells", "Metadata_ObjectNumber": ids, "Cells_AreaShape_Area": np.bincount(lab.ravel())[ids].astype(float),
                                  **({"Cells_AreaShape_Center_X": c[:, 1], "Cells_AreaShape_Center_Y": c[:, 0]} if centres else {})}))
    images = pd.DataFrame({"Metadata_ImageNumber": [1, 2], "Metadata_Well": ["A01", "A02"], "Image_FileName_DNA": ["a.tif", "b.tif"]})
    top = labels.max() + 1
    other = np.where(labels > 0, top - labels, 0) if centres else labels
    s = ImageSet(np.zeros((2, 1, 80, 90), np.float32), ["DNA"], [0, 1], ["c", "t"], pd.DataFrame({"Metadata_Well": ["A01", "A02"]}), "Metadata_Well", objects={"Cells": other.astype(np.int32)}, ids=["a.tif", "b.tif"])
    return CellProfilerTables(pd.concat(rows, ignore_index=True), images), s

@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize("on", [None, ["Well"]])
def test_rows_find_their_objects(on, centres):
    tables, s = matched(centres=centres)
    m = match(tables, s, on)
    mine = measure(s, families=("shape",), workers=1, progress=False)
    both = m.merge(mine, on=KEYS, suffixes=("", "|"))
    assert len(both) == len(m) == len(mine)
    assert both.Cells_AreaShape_Area.tolist() == both["Cells_AreaShape_Area|"].tolist()
    assert m.Metadata_Class.tolist() == np.where(m.Metadata_ImageIndex == 0, "c", "t").tolist()
    crops = s.crops("Cells", 32)
    tables.profiles["Metadata_ObjectNumber"] = both.Metadata_ObjectNumber
    c = match(tables, crops, on)
    assert len(c) == len(crops) and c.Metadata_ImageIndex.tolist() == sorted(c.Metadata_ImageIndex) and c.Metadata_ObjectNumber.tolist() == crops.meta.Metadata_ObjectNumber.iloc[c.Metadata_ImageIndex].tolist()

def test_what_does_not_match_is_named():
    tables, s = matched()
    tables.profiles.loc[3, ["Cells_AreaShape_Center_X"]] += 30
    tables.images.loc[1, "Image_FileName_DNA"] = "z.tif"
    notes = match(tables, s).attrs["notes"]
    n = tables.profiles.Metadata_ObjectNumber[3]
    assert any(f"Cells 1/{n}" in t and t.startswith("1 of") for t in notes) and any("ImageNumber 2" in t for t in notes) and any("b.tif" in t and t.startswith("1 of 2 images") for t in notes)
    tables.images["Image_FileName_DNA"] = "a.tif"
    with pytest.raises(PcimError, match="several of CellProfiler's images"): match(tables, s)
    tables.images["Image_FileName_DNA"] = "q.tif"
    with pytest.raises(PcimError, match="q.tif"): match(tables, s)
    with pytest.raises(PcimError, match="Metadata_Donor"): match(tables, s, ["Donor"])

def test_attribution_of_an_object_joins_with_its_features():
    demo = simulate(["er_intensity"], n_plates=1, wells_per_class=2, cells_per_well=2, seed=3)
    features = measure(demo, families=("shape",), workers=1, progress=False)
    change = np.abs(demo.load().numpy() - demo.load_counterfactuals().numpy())
    shares = attribution_by_object(change, demo)
    both = shares.merge(features, on=KEYS)
    assert len(both) == len(shares) == len(features)
    i, k = 0, int(both.Metadata_ObjectNumber[0])
    inside = np.any([demo.label_image(n, i) == k for n in JOINED], axis=0)
    np.testing.assert_allclose(both.Attribution_Share_ER[0], change[i, demo.channels.index("ER")][inside].sum() / change[i][:, inside].sum(), rtol=1e-6)
    np.testing.assert_allclose(both.Attribution_InObject[0], change[i][:, inside].sum() / change[i].sum(), rtol=1e-6)
    assert not set(feature_columns(features)) & set(shares)
    part = [c for c in shares if c.startswith("Attribution_Share_") and c.endswith(("_Nuclei", "_Cytoplasm")) and c.count("_") == 3]
    np.testing.assert_allclose(shares[part].sum(axis=1)[shares.Attribution_Total > 0], 1)

def test_profiles_of_one_plate_do_not_see_the_other(tmp_path):
    rng = np.random.default_rng(0)
    n = 160
    cells = pd.DataFrame({"Metadata_Plate": np.repeat(["P", "Q"], n // 2), "Metadata_Unit": np.repeat([f"{p}/{w}" for p in "PQ" for w in range(8)], n // 16), "Metadata_Object": "Cell"})
    cells["Metadata_Class"] = np.where(cells.Metadata_Unit.str[-1].astype(int) < 4, "DMSO", "drug")
    x = rng.normal(size=(n, 6)) + np.where(cells.Metadata_Plate == "P", 0, 50)[:, None]
    x[:, 0] += 4 * (cells.Metadata_Class == "drug")
    cells[[f"Cells_Intensity_F{k}_DNA" for k in range(6)]] = x
    cells["Cells_Intensity_Copy_DNA"], cells["Cells_Intensity_Flat_DNA"] = x[:, 1] * 2 + 1, 1.0
    w = well_profiles(cells, control="DMSO")
    c = w.normalised[w.normalised.Metadata_Control].groupby("Metadata_Plate")[[f"Cells_Intensity_F{k}_DNA" for k in range(6)]]
    np.testing.assert_allclose(c.mean(), 0, atol=1e-9)
    shifted = cells.copy()
    shifted.loc[shifted.Metadata_Plate == "Q", "Cells_Intensity_F2_DNA"] += 7
    pd.testing.assert_frame_equal(well_profiles(shifted, control="DMSO").normalised, w.normalised)  # a plate's offset is gone
    assert set(w.dropped.feature) == {"Cells_Intensity_Flat_DNA"} | (set(w.dropped.feature) & {"Cells_Intensity_F1_DNA", "Cells_Intensity_Copy_DNA"}) and len(w.dropped) == 2
    back = pd.read_parquet(write_profiles(w.selected, tmp_path / "größe" / "wells.parquet"))
    assert len(back) == 16 and list(back)[0].startswith("Metadata_")
    with pytest.raises(PcimError, match="several kinds"): well_profiles(pd.concat([cells, cells.assign(Metadata_Object="Spots")]))
    with pytest.raises(PcimError, match="1 control wells"): well_profiles(cells[(cells.Metadata_Class == "drug") | cells.Metadata_Unit.str.endswith("0")], control="DMSO")
    copairs = pytest.importorskip("copairs.map")
    ap = copairs.average_precision(back.filter(regex="^Metadata_"), back[feature_columns(back)].to_numpy(), ["Metadata_Class"], [], [], ["Metadata_Class"], progress_bar=False)
    assert len(ap) == 16 and ap.average_precision.notna().all()

def test_example_human_is_read_whole(real):
    r = read_cellprofiler(real / "example_human" / "ExampleHuman.sqlite")
    cell = r.profiles[r.profiles.Metadata_Object == "Cell"]
    assert len(cell) == 289 and not r.notes
    with closing(sqlite3.connect(f"file:{real / 'example_human' / 'ExampleHuman.sqlite'}?mode=ro", uri=True)) as db:
        for k in JOINED:
            raw = pd.read_sql_query(f"SELECT * FROM Per_{k}", db)
            features = [c for c in raw if c in cell and c.startswith(k)]
            assert len(features) > 90 and sorted(raw[f"{k}_AreaShape_Area"]) == sorted(cell[f"{k}_AreaShape_Area"])
    inside = cell.Cells_AreaShape_Area - cell.Nuclei_AreaShape_Area
    assert (inside >= 0).all() and (cell.Cytoplasm_AreaShape_Area >= inside).all()  # CellProfiler leaves the nucleus' rim in the cytoplasm
    apart = np.hypot(cell.Cells_AreaShape_Center_X - cell.Nuclei_AreaShape_Center_X, cell.Cells_AreaShape_Center_Y - cell.Nuclei_AreaShape_Center_Y)
    assert apart.median() < 5 and apart.max() < 30

def test_pla_equals_cellprofiler(real):
    "All 97 cells, through the dataset file of the report: areas, centres, dots."
    tables = read_cellprofiler(real / "pla_cellprofiler")
    spec = load_spec("pla")
    field = open_dataset(spec.model_copy(update={"crop": None}), real)
    m = match(tables, field)
    assert len(m) == 97 and (m.Metadata_ObjectNumber == m.Metadata_CellProfiler_ObjectNumber).all()
    from dataclasses import replace
    from pcim_nb.images import Lazy, read_labels
    dots = Lazy([real / "pla_cellprofiler" / i.replace("_C0.tif", "_PLA_labels.tiff") for i in field.ids], read_labels)
    mine = measure(replace(field, objects={**field.objects, "PLA_dots": dots}), families=("shape", "children"), workers=1, progress=False)
    both = m.merge(mine, on=KEYS, suffixes=("", "|"))
    assert len(both) == 97
    for c in ("Cells_AreaShape_Area", "Cells_AreaShape_Center_X", "Cells_AreaShape_Center_Y", "Cells_Children_PLA_dots_Count", "Nuclei_AreaShape_Area", "Nuclei_AreaShape_Perimeter"):
        np.testing.assert_allclose(both[c], both[f"{c}|"], rtol=1e-9, err_msg=c)
    crops = match(tables, open_dataset(spec, real))
    assert len(crops) == 97 and crops.groupby("Metadata_ImageId").size().max() == 1
    wells = aggregate(clean(crops)[0])
    assert wells.set_index("Metadata_Unit").Cells_Children_PLA_dots_Count.sort_values().iloc[-2:].round(1).tolist() == [49.7, 56.5]

def test_cell_painting_field_agrees_with_cellprofiler(real):
    import tifffile
    from skimage.segmentation import find_boundaries
    folder = real / "cellpainting_field"
    r = read_cellprofiler(folder / "BR00143976_shrunken.parquet")
    assert len(r.profiles) == 5 and not any("Brightfild" in c or "Brightfld" in c for c in r.profiles)
    outlines = {k: tifffile.imread(folder / "outlines" / f"{k}Outlines_BR00143976_C03_3.tiff") for k in ("Cells", "Nuclei")}
    cells = fill_outlines(outlines["Cells"])
    labels = {"Cells": cells, "Nuclei": fill_outlines(outlines["Nuclei"], within=cells)}
    rim = find_boundaries(labels["Nuclei"], connectivity=2, mode="inner")  # CellProfiler shrinks the nucleus by its rim before it is taken off
    labels["Cytoplasm"] = np.where((labels["Nuclei"] > 0) & ~rim, 0, cells)
    made, equal = measure_image(np.zeros((1, *cells.shape)), labels, ["DNA"], ("shape", "zernike", "neighbours")), 0
    for k, t in made.items():
        xy = t[[f"{k}_AreaShape_Center_X", f"{k}_AreaShape_Center_Y"]].to_numpy()
        for _, row in r.profiles.iterrows():
            found = t.iloc[np.hypot(*(xy - row[[f"{k}_AreaShape_Center_X", f"{k}_AreaShape_Center_Y"]].to_numpy(float)).T).argmin()]
            size = [c for c in t if "AreaShape" in c and not any(w in c for w in ("Zernike", "Center", "BoundingBoxM", "Orientation"))]
            np.testing.assert_allclose(found[size].to_numpy(float), row[size].to_numpy(float), rtol=0.02, err_msg=f"{k} of cell {row.Metadata_ObjectNumber}")
            equal += np.allclose(found[size].to_numpy(float), row[size].to_numpy(float), rtol=1e-9)
            moments = [c for c in t if "Zernike" in c]
            np.testing.assert_allclose(found[moments].to_numpy(float), row[moments].to_numpy(float), atol=0.01)
            if k == "Nuclei": assert found[f"{k}_Neighbors_NumberOfNeighbors_Adjacent"] == row[f"{k}_Neighbors_NumberOfNeighbors_Adjacent"]
    assert equal >= 12  # of 15: the others hang on pixels that two touching outlines leave open
