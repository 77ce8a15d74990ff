"Opening data sets: nothing is read before it is needed, and real sets open as their dataset files say."
import numpy as np
import pandas as pd
import pytest

from pcim_nb import datasets
from pcim_nb.datasets import builtin_datasets, load_spec, open_dataset, parse_spec


def test_ten_thousand_fields_are_opened_without_being_read(fields, monkeypatch):
    folder, spec = fields
    table = pd.read_csv(folder / "table.csv")
    pd.concat([table] * 278, ignore_index=True).to_csv(folder / "many.csv", index=False)
    read = []
    monkeypatch.setattr(datasets, "read_array", lambda p, original=datasets.read_array: read.append(p) or original(p))
    iset = open_dataset(parse_spec({**spec, "base": str(folder), "images": {**spec["images"], "path": "many.csv"}}))
    assert len(iset) == 278 * len(table) > 10_000
    assert len(read) == 2                                   # the first image, for its shape: one file a channel
    assert iset.image(10_000).shape == (2, 40, 40) and len(read) == 4
    part = iset.subset(np.arange(5_000, 10_000))
    assert len(part) == 5_000 and len(read) == 6            # a subset looks at its first image, no more


def test_mirrored_windows_keep_the_object_in_the_middle(fields):
    folder, spec = fields
    iset = open_dataset(parse_spec({**spec, "base": str(folder), "crop": {"objects": "Cells", "size": 36}}))
    assert iset.shape == (2, 36, 36) and len(iset) == 36
    for i in range(0, 36, 5):
        y, x = np.nonzero(iset.label_image("Cells", i))
        assert abs(y.mean() - 17.5) < 1 and abs(x.mean() - 17.5) < 1


@pytest.mark.parametrize("path", [p for p in builtin_datasets() if p.stem != "demo"], ids=lambda p: p.stem)
def test_real_sets_open(data, path):
    spec = load_spec(path)
    iset = open_dataset(spec, data)
    image = iset.image(len(iset) - 1)
    assert image.dtype == np.float32 and 0 <= image.min() < image.max() <= 1
    assert min(iset.class_counts().values()) > 0
    for name in iset.objects: assert iset.label_image(name, 0).max() > 0


def test_pla_crops_are_cellprofilers_cells(data):
    "97 cells, as CellProfiler's own tables say, under its own object numbers."
    iset = open_dataset("pla", data)
    table = pd.concat([pd.read_csv(p, sep="\t") for p in sorted((data / "pla_cellprofiler").glob("Well_*_cells.txt"))])
    assert len(iset) == len(table) == 97
    counted = table.groupby("FileName_DNA").ObjectNumber.apply(sorted).to_dict()
    for name, rows in iset.meta.groupby("Metadata_Field"): assert sorted(rows.Metadata_ObjectNumber) == counted[name]


def test_zarr_of_jump_sites(data):
    "Zarr v3 as another tool wrote it: two sites, five stains."
    iset = open_dataset(parse_spec({"name": "jump", "images": {"reader": "stack", "path": "jump_rab30_mini/images.zarr", "array": "images", "table": "jump_rab30_mini/sites.csv",
                                    "channels": ["AGP", "DNA", "ER", "Mito", "RNA"]}, "labels": {"column": "modality"}, "group": "Plate"}), data)
    assert iset.shape == (5, 384, 384) and iset.classes == ["CRISPR", "ORF"] and iset.units[0] == "BR00123947"
