"Whatever is wrong with the input is said in one line, with the file or field, what was found and what was expected; the exit status is 1."
import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml

from pcim_nb.cli import main


def report(folder, spec, capsys, *more):
    (folder / "set.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True), encoding="utf-8")
    status = main(["report", str(folder / "set.yaml"), "-o", str(folder / "out"), "-q", *more])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pcim: error:")]
    return status, said


def change(spec, path, value):
    *above, last = path.split(".")
    for k in above: spec = spec[k]
    spec[last] = value


def edit_table(folder, **columns):
    pd.read_csv(folder / "table.csv").assign(**columns).to_csv(folder / "table.csv", index=False)


FIELDS = {  # what is changed in the dataset file → what the message must say
    "missing table": ("images.path", "absent.csv", ["images.path", "absent.csv"]),
    "wrong channel count": ("images", {"reader": "table", "path": "table.csv", "column": "FileName_DNA", "channels": ["DNA", "ER"]}, ["f0_DNA.tif", "1 channels", "expected 2"]),
    "unknown channel": ("images.channels", ["DNA", "Mito"], ["FileName_Mito", "found FileName_DNA"]),
    "unknown field": ("grupo", "Plate", ["grupo", "unknown field"]),
    "unknown nested field": ("model.train.epoch", 3, ["model.train.epoch", "epochs"]),
    "unknown class": ("labels.classes", ["control", "cured"], ["labels.classes", "cured", "treated"]),
    "label column missing": ("labels.column", "moa", ["labels.column", "moa", "treatment"]),
    "one class only": ("select", {"treatment": ["control"]}, ["treated"]),
    "unknown method": ("attribution.methods", ["GradMagic"], ["attribution.methods", "GradMagic", "IntegratedGradients"]),
    "unknown group": ("group", "patient", ["group", "Metadata_Patient", "Metadata_Plate"]),
    "group in training and test": ("split", {"column": "Well", "test": ["A01", "B01"]}, ["P0", "training and test"]),
    "no such test value": ("split", {"column": "Plate", "test": ["P9"]}, ["P9"]),
    "no counterfactuals": ("masking.counterfactual", "exact", ["masking.counterfactual", "nearest"]),
    "unknown architecture": ("model.architecture", "resnet_9000", ["resnet_9000", "small_cnn"]),
    "factory that is not there": ("model.architecture", "no_such_package.module:make", ["no_such_package"]),
    "weights that are not there": ("model.weights", "model.safetensors", ["model.weights", "model.safetensors"]),
    "bad name": ("name", "a/b", ["name"]),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields(fields, capsys, case):
    folder, spec = fields
    path, value, expected = FIELDS[case]
    change(spec, path, value)
    status, said = report(folder, spec, capsys)
    assert status == 1 and len(said) == 1, said
    for text in expected: assert text in said[0], said[0]


def test_not_yaml(fields, capsys):
    folder, _ = fields
    (folder / "set.yaml").write_text("name: [unclosed\nimages: {")
    assert main(["report", str(folder / "set.yaml")]) == 1
    assert "set.yaml: not valid YAML at line" in capsys.readouterr().err


def break_image(folder, what):
    path = folder / "f4_ER.tif"
    a = tifffile.imread(path)
    if what == "truncated": path.write_bytes(path.read_bytes()[:900])
    elif what == "text": path.write_text("no image")
    elif what == "missing": path.unlink()
    elif what == "shape": tifffile.imwrite(path, a[:30])
    elif what == "both shapes": [tifffile.imwrite(folder / f"f4_{c}.tif", a[:30]) for c in ("DNA", "ER")]
    elif what == "constant": tifffile.imwrite(path, np.full_like(a, 500))
    elif what == "nan": tifffile.imwrite(path, np.where(a > a.mean(), np.nan, .5).astype(np.float32))
    elif what == "range": tifffile.imwrite(path, a.astype(np.float32))
    elif what == "mask": tifffile.imwrite(folder / "f4_cells.tif", np.zeros((20, 40), np.uint16))


IMAGES = {"truncated": ["f4_ER.tif", "truncated"], "text": ["f4_ER.tif", "unreadable"], "missing": ["f4_ER.tif", "missing"], "shape": ["f4_ER.tif", "30×40", "40×40"],
          "both shapes": ["f4_DNA.tif", "2×30×40", "2×40×40"], "constant": ["f4_DNA.tif", "ER", "constant"], "nan": ["f4_ER", "NaN"],
          "range": ["f4_ER.tif", "max_value"], "mask": ["f4_DNA.tif", "20×40", "40×40"]}


@pytest.mark.parametrize("what", IMAGES)
def test_images(fields, capsys, what):
    folder, spec = fields
    break_image(folder, what)
    status, said = report(folder, spec, capsys)
    assert status == 1 and len(said) == 1, said
    for text in IMAGES[what]: assert text in said[0], said[0]
    if what in ("truncated", "nan", "mask"): assert "f4_" in (folder / "out/fields/report.html").read_text(encoding="utf-8")  # found while running: a page says the same


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "classes/a").mkdir(parents=True), (tmp_path / "classes/b").mkdir()
    spec = {"name": "empty", "images": {"reader": "folders", "path": "classes", "channels": ["DNA"]}}
    status, said = report(tmp_path, spec, capsys)
    assert status == 1 and "classes/a holds no images" in said[0]


def test_a_class_that_no_training_plate_has(fields, capsys):
    folder, spec = fields
    table = pd.read_csv(folder / "table.csv")
    edit_table(folder, treatment=np.where(table.Metadata_Plate == "P0", "control", "treated"))
    spec["split"] = {"column": "Plate", "test": ["P0"]}
    status, said = report(folder, spec, capsys)
    assert status == 1 and "control" in said[0] and "training" in said[0]


def test_the_others_go_on(fields, capsys):
    "One bad file does not stop a good one, and its failure still shows in the exit status."
    folder, spec = fields
    (folder / "bad.yaml").write_text("name: bad\n")
    assert main(["report", str(folder / "bad.yaml"), str(folder / "set.yaml"), "-o", str(folder / "out"), "-q"]) == 1
    done = capsys.readouterr()
    assert "1 of 2 reports failed" in done.err and done.out.strip() == str(folder / "out/fields/report.html")
