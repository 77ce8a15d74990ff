"Shared by all tests: a small data set on disk, and the real images where they are."
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two test processes share the cores: waiting threads give way

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml


def write_fields(folder: Path, n_plates: int = 3, wells: int = 2, fields: int = 3, size: int = 40, seed: int = 0) -> dict:
    """Two-stain fields as TIFF files with a LoadData table and label images; the class `treated` has a brighter disc in ER. Returns the dataset file's content,
    which stands in `folder/set.yaml`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    yy, xx = np.mgrid[:size, :size]
    rows = []
    for p in range(n_plates):
        for treatment in ("control", "treated"):
            for w in range(wells):
                for _ in range(fields):
                    i = len(rows)
                    y, x = rng.integers(14, size - 14, 2)
                    disc = (yy - y) ** 2 + (xx - x) ** 2 < 100
                    dna = 3000 + 20000 * disc + rng.normal(0, 800, disc.shape)
                    er = 3000 + (30000 if treatment == "treated" else 9000) * disc + rng.normal(0, 800, disc.shape)
                    for name, a in (("DNA", dna), ("ER", er)): tifffile.imwrite(folder / f"f{i}_{name}.tif", a.clip(0, 65535).astype(np.uint16))
                    tifffile.imwrite(folder / f"f{i}_cells.tif", disc.astype(np.uint16))
                    rows.append({"FileName_DNA": f"f{i}_DNA.tif", "FileName_ER": f"f{i}_ER.tif", "cells": f"f{i}_cells.tif", "Metadata_Plate": f"P{p}",
                                 "Metadata_Well": f"{'AB'[treatment == 'treated']}{w + 1:02}", "treatment": treatment, "file_number": i})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    spec = {"name": "fields", "images": {"reader": "table", "path": "table.csv", "channels": ["DNA", "ER"]},
            "labels": {"column": "treatment", "classes": ["control", "treated"]}, "group": "Plate", "unit": "Well",
            "masks": {"column": "cells"}, "objects": {"Cells": {"column": "cells"}}, "model": {"train": {"epochs": 2}},
            "attribution": {"images_per_class": 2, "methods": ["InputXGradient"]}, "masking": {"counterfactual": "blur", "steps": 10, "images_per_class": 2},
            "profiles": {"families": ["intensity"]}}
    (folder / "set.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True), encoding="utf-8")
    return spec


@pytest.fixture
def fields(tmp_path):
    "(folder, content of its dataset file)"
    folder = tmp_path / "daten größe"
    return folder, write_fields(folder)


@pytest.fixture
def data():
    "The folder of real images; the test skips where there is none."
    root = os.environ.get("PCIM_DATA")
    if not root or not Path(root).is_dir(): pytest.skip("PCIM_DATA names no folder of real images")
    return Path(root)
