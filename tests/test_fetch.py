"Downloads against a server on localhost that knows ranges, breaks off, changes its files, or is not there."
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
import requests
import tifffile
from PIL import Image

from pcim_nb import fetch as module
from pcim_nb.datasets import load_spec, open_dataset
from pcim_nb.fetch import BBBC021_PLATES, PUBLIC, Resume, digest, fetch
from pcim_nb.images import PcimError

GONE = "http://127.0.0.1:9"


class Server:
    "`files` by name; `cut`: breaks off after so many bytes of a body; `ranges`: whether it knows them; `slow`: seconds a 50 kB; `seen`: (name, range asked for)."
    def __init__(self):
        self.files, self.cut, self.ranges, self.slow, self.seen = {}, None, True, 0, []
        me = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                asked = self.headers.get("Range")
                me.seen.append((name, asked))
                data = me.files.get(name)
                if data is None: return self.send_error(404)
                tag = f'"{hashlib.md5(data).hexdigest()}"'
                start = int(asked.removeprefix("bytes=").rstrip("-")) if me.ranges and asked and self.headers.get("If-Range") == tag else 0
                if start >= len(data) > 0:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}"), self.send_header("Content-Length", "0"), self.end_headers()
                    return None
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start)), self.send_header("ETag", tag), self.end_headers()
                body = data[start:] if me.cut is None else data[start:start + me.cut]
                try:
                    for k in range(0, len(body), 50_000):
                        self.wfile.write(body[k:k + 50_000])
                        time.sleep(me.slow)
                except OSError: pass                                     # the other side has gone

            def log_message(self, *args): pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    s = Server()
    yield s
    s.http.shutdown(), s.http.server_close()


CONTENT = np.random.default_rng(0).bytes(1_000_000)


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.files, server.cut = {"a": CONTENT}, 300_000
    part = tmp_path / "a.part"
    with pytest.raises(requests.exceptions.RequestException): Resume(part, False, tries=1)(f"{server.url}/a", tmp_path / "a")
    have = part.stat().st_size
    assert 200_000 < have <= 300_000 and not (tmp_path / "a").exists()
    server.cut = None
    Resume(part, False)(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and server.seen[-1] == ("a", f"bytes={have}-") and list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_broken_connection_is_taken_up_again_at_once(server, tmp_path):
    server.files, server.cut = {"a": CONTENT}, 400_000
    Resume(tmp_path / "a.part", False, tries=4)(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and len(server.seen) == 3


def test_everything_has_come_already(server, tmp_path):
    server.files, part = {"a": CONTENT}, tmp_path / "a.part"
    part.write_bytes(CONTENT)
    (tmp_path / "a.part.json").write_text(json.dumps({"url": f"{server.url}/a", "etag": f'"{hashlib.md5(CONTENT).hexdigest()}"'}))
    Resume(part, False)(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and server.seen == [("a", "bytes=1000000-")]


@pytest.mark.parametrize("how", ["changed", "no ranges", "unknown version", "another address"])
def test_parts_that_do_not_fit_are_not_joined(server, tmp_path, how):
    server.files, server.cut, part = {"a": CONTENT, "b": CONTENT[::-1]}, 300_000, tmp_path / "a.part"
    with pytest.raises(requests.exceptions.RequestException): Resume(part, False, tries=1)(f"{server.url}/a", tmp_path / "a")
    server.cut = None
    if how == "changed": server.files["a"] = CONTENT[::-1]
    if how == "no ranges": server.ranges = False
    if how == "unknown version": (tmp_path / "a.part.json").unlink()
    name = "b" if how == "another address" else "a"
    Resume(part, False)(f"{server.url}/{name}", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == server.files[name]


def test_killed_and_started_again(server, tmp_path):
    server.files, server.slow = {"BBBC010_v2_images.zip": CONTENT}, .1
    code = f"from pcim_nb.fetch import fetch; fetch('bbbc010', {str(tmp_path)!r}, mirror={server.url!r}, progress=False)"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "downloads/BBBC010_v2_images.zip.part"
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 200_000) and time.monotonic() < until: time.sleep(.02)
    os.kill(run.pid, signal.SIGKILL), run.wait()
    have, server.slow = part.stat().st_size, 0
    assert 0 < have < len(CONTENT)
    with pytest.raises(PcimError, match="expected sha256:77a82c"): fetch("bbbc010", tmp_path, mirror=server.url, progress=False, tell=lambda _: None)      # whole now, but not the published file
    assert server.seen[-1] == ("BBBC010_v2_images.zip", f"bytes={have}-") and not part.exists() and not (tmp_path / "bbbc010").exists()


# ---- whole sets ----
def tiff(a):
    b = io.BytesIO()
    tifffile.imwrite(b, a)
    return b.getvalue()


def image(a, kind="PNG"):
    b = io.BytesIO()
    Image.fromarray(a).save(b, kind)
    return b.getvalue()


def zipped(files):
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w") as z:
        for name, data in files.items(): z.writestr(name, data)
    return b.getvalue()


def worms():
    rng, worm = np.random.default_rng(0), np.zeros((52, 70), np.uint8)
    worm[20:30, 10:60] = 255
    wells = ["A01", "B12", "C13", "E24"]
    return {"BBBC010_v2_images.zip": zipped({f"1649_1109_0003_Amp5-1_B_20070424_{w}_w{c}_9E84F49F-{k}.tif": tiff(rng.integers(0, 4095, (52, 70)).astype(np.uint16)) for k, w in enumerate(wells) for c in (1, 2)}),
            "BBBC010_v1_foreground.zip": zipped({f"BBBC010_v1_foreground/{w}_binary.png": image(worm) for w in wells}),
            "BBBC010_v1_foreground_eachworm.zip": zipped({f"BBBC010_v1_foreground_eachworm/{w}_{k:02}_ground_truth.png": image(worm) for w in wells for k in (1, 2)})}


def trust(root, files):
    "These made-up files, in the user's own record."
    (root / "downloads").mkdir(parents=True, exist_ok=True)
    (root / "downloads/hashes.json").write_text(json.dumps({n: f"sha256:{hashlib.sha256(b).hexdigest()}" for n, b in files.items()}))


def quiet(*args, **kw): return fetch(*args, progress=False, tell=lambda _: None, **kw)


def test_bbbc010_opens_with_its_dataset_files(server, tmp_path):
    server.files, said = worms(), []
    trust(tmp_path, server.files)
    folder = fetch("bbbc010", tmp_path, mirror=server.url, progress=False, tell=said.append)
    assert folder == tmp_path / "bbbc010" and "Licence" in said[0] and "cite" in said[0] and "pcim report bbbc010" in said[-1]
    for name, channels in (("bbbc010", 1), ("bbbc010_both", 2)):
        iset = open_dataset(load_spec(name), tmp_path)
        iset.check()
        assert iset.shape == (channels, 260, 348) and [iset.classes[k] for k in iset.labels] == ["live", "live", "dead", "dead"] and iset.label_image("Worms", 3).max() == 2
    n = len(server.seen)
    assert quiet("bbbc010", tmp_path, mirror=server.url) == folder and len(server.seen) == n         # there already: nothing is asked for


def test_glas_is_unpacked_from_a_file_brought_by_hand(tmp_path, monkeypatch):
    rng, names = np.random.default_rng(0), ["train_1", "train_2", "testA_1", "testB_1"]
    glands = np.zeros((40, 60), np.uint8)
    glands[5:15, 5:20], glands[20:30, 30:50] = 1, 2
    table = "name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)\n" + "".join(f"{n},{k + 1}, {'malignant' if k % 2 else 'benign'}, x\n" for k, n in enumerate(names))
    files = {"warwick_qu_dataset_released_2016_07_08.zip": zipped({f"Warwick QU Dataset (Released 2016_07_08)/{n}.bmp": image(rng.integers(0, 255, (40, 60, 3)).astype(np.uint8), "BMP") for n in names}
                                                                  | {f"Warwick QU Dataset (Released 2016_07_08)/{n}_anno.bmp": image(glands, "BMP") for n in names} | {"Warwick QU Dataset (Released 2016_07_08)/Grade.csv": table.encode()})}
    with pytest.raises(PcimError, match="by hand from https://warwick.ac.uk.*downloads/warwick_qu"): quiet("glas", tmp_path, accept_licence=True)
    trust(tmp_path, files)
    (tmp_path / "downloads/warwick_qu_dataset_released_2016_07_08.zip").write_bytes(files["warwick_qu_dataset_released_2016_07_08.zip"])
    asked = []
    quiet("glas", tmp_path, ask=lambda q: asked.append(q) or "yes")
    iset = open_dataset(load_spec("glas"), tmp_path)
    iset.check()
    assert len(asked) == 1 and iset.class_counts() == {"benign": 2, "malignant": 2} and iset.channels == ["Red", "Green", "Blue"] and iset.label_image("Glands", 0).max() == 2
    assert pd.read_csv(tmp_path / "glas/Grade.csv").split.tolist() == ["train", "train", "testA", "testB"]


def test_bbbc021_becomes_crops_of_single_cells(server, tmp_path):
    rng, rows, plates, (yy, xx) = np.random.default_rng(0), [], {}, np.mgrid[:260, :300]
    spots = [(60, 60), (60, 200), (180, 60), (190, 210), (130, 20)]                # the last one is too near the border for a crop
    for plate in BBBC021_PLATES:
        inside = {}
        for k, (well, compound, dose) in enumerate([("B02", "DMSO", 0.0), ("B03", "cyclohexamide", 50.0), ("C05", "taxol", 1.0)]):
            r = {"Image_Metadata_Plate_DAPI": plate, "Image_Metadata_Well_DAPI": well, "Image_Metadata_Compound": compound, "Image_Metadata_Concentration": dose}
            for c, stain in enumerate(("DAPI", "Tubulin", "Actin")):
                a = sum(8000 * (c + 1) * np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / 250) for y, x in spots) + rng.normal(300, 20, yy.shape)
                inside[f"{plate}/G10_s1_w{c}{plate}{k}.tif"] = tiff(a.clip(0, 65535).astype(np.uint16))
                r[f"Image_FileName_{stain}"] = f"G10_s1_w{c}{plate}{k}.tif"
            rows.append(r)
        plates[f"BBBC021_v1_images_{plate}.zip"] = zipped(inside)
    moa = pd.DataFrame({"compound": ["DMSO", "cyclohexamide", "taxol"], "concentration": [0.0, 50.0, 1.0], "moa": ["DMSO", "Protein synthesis", "Microtubule stabilizers"]})
    server.files = {"BBBC021_v1_image.csv": pd.DataFrame(rows).to_csv(index=False).encode(), "BBBC021_v1_moa.csv": moa.to_csv(index=False).encode(), **plates}
    said = []
    folder = fetch("bbbc021", tmp_path, accept_licence=True, mirror=server.url, progress=False, tell=said.append)
    assert sum("trusted this first time" in s for s in said) == 4                   # not one hash of this set is known beforehand
    iset = open_dataset(load_spec("bbbc021_cells"), tmp_path)
    iset.check()
    assert iset.class_counts() == {"DMSO": 8, "Protein synthesis": 8} and iset.shape == (3, 68, 68) and set(iset.groups) == set(BBBC021_PLATES)
    middle = np.load(folder / f"{BBBC021_PLATES[0]}.npz")["images"][:, 34, 34].astype(float)
    assert np.allclose(middle / middle[:, :1], [1, 2, 3], rtol=.1) and iset.label_image("Nuclei", 0)[34, 34] == 1     # DNA, tubulin, actin, the nucleus in the middle


def test_hashes(server, tmp_path):
    server.files = worms()
    with pytest.raises(PcimError) as e: quiet("bbbc010", tmp_path, mirror=server.url)
    got = hashlib.sha256(server.files["BBBC010_v2_images.zip"]).hexdigest()
    assert got in str(e.value) and "77a82c74" in str(e.value) and "recorded by public projects" in str(e.value)
    assert not (tmp_path / "downloads/BBBC010_v2_images.zip").exists() and not (tmp_path / "bbbc010").exists()
    # a file brought by hand is held against the hash too, and is left where it is
    by_hand = tmp_path / "downloads/BBBC010_v2_images.zip"
    by_hand.write_bytes(b"something else")
    with pytest.raises(PcimError, match="put its hash into"): quiet("bbbc010", tmp_path, mirror=server.url)
    assert by_hand.read_bytes() == b"something else"
    by_hand.unlink()
    # trusted on first use: written down, and expected from then on
    known = {n: b for n, b in server.files.items() if n != "BBBC010_v1_foreground.zip"}
    trust(tmp_path, known)
    quiet("bbbc010", tmp_path, mirror=server.url)
    kept = json.loads((tmp_path / "downloads/hashes.json").read_text())
    assert kept["BBBC010_v1_foreground.zip"] == digest(tmp_path / "downloads/BBBC010_v1_foreground.zip") == f"sha256:{hashlib.sha256(server.files['BBBC010_v1_foreground.zip']).hexdigest()}"
    import shutil
    shutil.rmtree(tmp_path / "bbbc010"), (tmp_path / "downloads/BBBC010_v1_foreground.zip").unlink()
    server.files["BBBC010_v1_foreground.zip"] = zipped({"A01_binary.png": b"x"})
    with pytest.raises(PcimError, match="recorded in"): quiet("bbbc010", tmp_path, mirror=server.url)


def test_no_network_says_what_to_do(tmp_path):
    with pytest.raises(PcimError) as e: quiet("bbbc010", tmp_path, mirror=GONE)
    text = str(e.value)
    assert "cannot be reached" in text and f"by hand from https://bbbc.broadinstitute.org/BBBC010 to {tmp_path}/downloads/BBBC010_v2_images.zip, then run the same command again" in text and "\n" not in text
    assert not (tmp_path / "bbbc010").exists()


def test_a_file_that_is_not_there_and_one_that_broke_off(server, tmp_path):
    with pytest.raises(PcimError, match="answered 404"): quiet("bbbc010", tmp_path, mirror=server.url)
    server.files, server.cut = {"BBBC010_v2_images.zip": CONTENT}, 100_000
    with pytest.raises(PcimError, match=r"broke off; 0\.\d MB have come and are kept"): quiet("bbbc010", tmp_path, mirror=server.url)


@pytest.mark.parametrize("ask", [None, lambda q: "", lambda q: "no", lambda q: "nope"])
@pytest.mark.parametrize("name", [n for n, s in PUBLIC.items() if s.restricted])
def test_without_consent_nothing_is_downloaded(server, tmp_path, name, ask):
    with pytest.raises(PcimError, match="--accept-licence"): quiet(name, tmp_path, ask=ask, mirror=server.url)
    assert server.seen == [] and list(tmp_path.iterdir()) == []


def test_archives_that_are_not_as_expected(server, tmp_path):
    good = worms()
    for bad, why in ((b"no zip at all", "damaged"), (zipped({"readme.txt": b"x"}), "holds no file named like"), (zipped({"x_A01_w1_a.tif": b"x"}), "well A01")):
        server.files = good | {"BBBC010_v2_images.zip": bad}
        (tmp_path / "downloads/BBBC010_v2_images.zip").unlink(missing_ok=True)
        trust(tmp_path, server.files)
        with pytest.raises(PcimError, match=why): quiet("bbbc010", tmp_path, mirror=server.url)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["downloads"]              # nothing half done is left
    # names that would leave the folder do not
    evil = zipped({"../../../x_A01_w1_a.tif": b"x", "/tmp/x_A01_w2_a.tif": b"x"})
    module._extract((tmp_path / "e.zip", (tmp_path / "e.zip").write_bytes(evil))[0], r".*_([A-P]\d\d)_w([12])_.*\.tiff?", tmp_path / "inside")
    assert sorted(p.name for p in (tmp_path / "inside").iterdir()) == ["x_A01_w1_a.tif", "x_A01_w2_a.tif"]


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(PcimError, match="expected one of bbbc010"): quiet("bbbc999", tmp_path)
    monkeypatch.delenv("PCIM_DATA", raising=False)
    with pytest.raises(PcimError, match="--data-root"): quiet("bbbc010")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PcimError, match="cannot be made"): quiet("bbbc010", tmp_path / "file")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/hashes.json").write_text("{")
    with pytest.raises(PcimError, match="is no JSON"): quiet("bbbc010", tmp_path, mirror=GONE)
