"Batches of reports: interrupted, killed, on a scheduler; nothing is made twice and nothing is lost."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from pcim_nb.batch import read_status, run_batch

SET = "name: {}\nimages: {{reader: simulator, options: {{n_plates: 2, cells_per_well: 2, size: 48}}}}\nseed: {}\n"
# what a report does, without its length: note that it ran, take its time, write its numbers
BODY = """
import json, pathlib, sys, time
folder = pathlib.Path(out)
print("[%s] 1/1 at work" % spec["name"], file=sys.stderr, flush=True)
with open(folder.parent/"runs.txt", "a") as f: f.write(spec["name"] + " ")
time.sleep(SECONDS)
if spec["seed"] == 13: raise ValueError("unlucky")
(folder/"numbers.json").write_text(json.dumps({"images": spec["seed"]}))
"""


@pytest.fixture
def screen(tmp_path):
    "A folder of three dataset files and a notebook that stands for the report."
    (tmp_path / "sets").mkdir()
    for k, n in enumerate("abc"): (tmp_path / "sets" / f"{n}.yaml").write_text(SET.format(n, k))

    def notebook(seconds=0.):
        start = new_code_cell("spec = None\nout = None\nroot = None", metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[start, new_code_cell(BODY.replace("SECONDS", str(seconds)))]), tmp_path / "report.ipynb")
        return tmp_path / "report.ipynb"
    notebook()
    return tmp_path, notebook


def runs(folder): return sorted((folder / "out/runs.txt").read_text().split())


def test_only_what_is_missing_or_changed_is_made(screen):
    folder, _ = screen
    kw = dict(out=folder / "out", notebook=folder / "report.ipynb", progress=False)
    (folder / "sets/c.yaml").write_text(SET.format("c", 13))
    first = run_batch([folder / "sets"], **kw)
    assert first.state.tolist() == ["done", "done", "failed"] and "unlucky" in first.error[2]
    assert "unlucky" in (folder / "out/c/report.html").read_text()
    (folder / "sets/c.yaml").write_text(SET.format("c", 3))
    (folder / "sets/b.yaml").write_text(SET.format("b", 5))
    second = run_batch([folder / "sets"], **kw)
    assert second.state.tolist() == ["done"] * 3 and second.made.tolist() == [False, True, True]
    assert runs(folder) == ["a", "b", "b", "c", "c"]
    assert pd.read_csv(folder / "out/index.csv").images.tolist() == [0, 5, 3]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_started_again(screen, how):
    folder, notebook = screen
    notebook(seconds=4)
    script = f"from pcim_nb.batch import run_batch; run_batch([{str(folder / 'sets')!r}], {str(folder / 'out')!r}, workers=1, notebook={str(folder / 'report.ipynb')!r}, progress=False)"
    batch = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    end = time.time() + 180
    begun = folder / "out/runs.txt"
    while (not begun.exists() or len(begun.read_text().split()) < 2) and time.time() < end: time.sleep(.1)
    batch.send_signal(how)
    batch.wait(timeout=60)
    at_stop = runs(folder)
    time.sleep(8)                                  # whoever survived its parent would go on now
    assert runs(folder) == at_stop == ["a", "b"]
    assert read_status(folder / "out/a")["state"] == "done" and read_status(folder / "out/b") is None
    table = run_batch([folder / "sets"], folder / "out", notebook=folder / "report.ipynb", progress=False)
    assert table.state.tolist() == ["done"] * 3 and table.made.tolist() == [False, True, True]
    assert runs(folder) == ["a", "b", "b", "c"]


def test_a_scheduler_given_by_its_address(screen):
    folder, _ = screen
    port = 20000 + os.getpid() % 20000
    env = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__DASHBOARD__ENABLED": "False"}
    start = lambda *args: subprocess.Popen([sys.executable, "-m", "distributed.cli." + args[0], *args[1:]], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"tcp://127.0.0.1:{port}"
    started = [start("dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"),
               *(start("dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", str(folder / f"w{k}")) for k in range(2))]
    try: table = run_batch([folder / "sets"], folder / "out", scheduler=address, notebook=folder / "report.ipynb", progress=False)
    finally:
        for p in started: p.kill()
        for p in started: p.wait(timeout=30)
    assert table.state.tolist() == ["done"] * 3 and runs(folder) == ["a", "b", "c"]
    assert [json.loads((Path(folder) / "out" / n / "numbers.json").read_text())["images"] for n in "abc"] == [0, 1, 2]


CTRL_C = """
import signal
from pcim_nb.batch import _ctrl_c
class Last:
    def __del__(self): signal.raise_signal(signal.SIGINT)      # python drops what is raised in here
with _ctrl_c() as pressed:
    a = Last()
    before = pressed()
    del a
    print(before, pressed())
    try: signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt: print('stopped')
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_ctrl_c_is_not_lost_in_a_destructor():
    said = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "True", "stopped", "True"] and not said.stderr
