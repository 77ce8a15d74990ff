"""A page opened in headless Chromium with every way out of the machine closed, over the browser's own debugging pipe: no further package needed.

    with Browser() as b:
        page = b.open(path, width=400)      # dict: console, requests, dom, screenshot, sideways
        b.run("document.title")             # JavaScript in that page
`open_page(path, width)` does the same for one page. `CHROMIUM` is None where there is no browser; tests then skip.
"""
import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)
NO_BROWSER = "no chromium or chrome on this machine: pages are not opened in a browser"
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
          "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>", "--remote-debugging-pipe"]


class Browser:
    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="browser-")
        child_in, self.out = os.pipe()
        self.inp, child_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (child_in, child_out)]

        def wire():                                                    # Chromium reads commands on 3 and answers on 4
            os.dup2(high[0], 3), os.dup2(high[1], 4)

        self.process = subprocess.Popen([CHROMIUM, *_FLAGS, f"--user-data-dir={self.folder}"], preexec_fn=wire, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for fd in (child_in, child_out, *high): os.close(fd)
        self.buffer, self.n, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"): self.call(f"{domain}.enable")

    def __enter__(self): return self

    def __exit__(self, *_):
        os.close(self.out), os.close(self.inp)
        try: os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, until: float):
        while b"\0" not in self.buffer:
            if not select.select([self.inp], [], [], max(0, until - time.monotonic()))[0]: raise TimeoutError("the browser did not answer")
            data = os.read(self.inp, 1 << 20)
            if not data: raise RuntimeError("the browser has gone")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, timeout: float = 60, **params) -> dict:
        "One command of the DevTools protocol and its result; what happens meanwhile is kept in `events`."
        self.n += 1
        message = {"id": self.n, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        data = json.dumps(message).encode() + b"\0"
        while data: data = data[os.write(self.out, data):]
        until = time.monotonic() + timeout
        while True:
            answer = self._read(until)
            if answer.get("id") == self.n:
                if "error" in answer: raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if "method" in answer: self.events.append(answer)

    def run(self, script: str):
        "The value of a JavaScript expression in the page (awaited if it is a promise)."
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer: raise RuntimeError(str(answer["exceptionDetails"].get("exception", {}).get("description", answer["exceptionDetails"])))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        until, said = time.monotonic() + seconds, ""
        while True:
            try:
                if self.run(condition): return
            except RuntimeError as e: said = f" ({e})"                 # a page that is just being replaced
            if time.monotonic() > until: raise TimeoutError(f"never true in the page: {condition}{said}")
            time.sleep(.05)

    def open(self, path, width: int = 1400, height: int = 900, dark: bool = False, ready: str = "document.readyState == 'complete'", screenshot=None) -> dict:
        """Open a file (or URL) and wait for `ready`. Returns `console` (warnings, errors, uncaught exceptions), `requests` (every address asked for but the page
        itself and data in it), `dom` (HTML after scripts ran), `screenshot` (PNG of the whole page; also written to the path `screenshot`) and `sideways`
        (how many pixels the page is wider than the window)."""
        url = str(path) if "://" in str(path) else Path(path).resolve().as_uri()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"location.href != 'about:blank' && ({ready})")
        self.run("new Promise(r => setTimeout(r, 150))")
        dom = self.run("document.documentElement.outerHTML")
        # lazy pictures load before the picture is taken
        self.run("Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0); })).then(() => 0)")
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        png = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={"x": 0, "y": 0, "width": width, "height": min(size["height"], 16000), "scale": 1})["data"])
        if screenshot: Path(screenshot).write_bytes(png)
        sideways = self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return {"console": self.console(), "requests": self.requests(url), "dom": dom, "screenshot": png, "sideways": sideways}

    def console(self) -> list[str]:
        "What the page complained about so far."
        said = []
        for e in self.events:
            p = e["params"]
            if e["method"] == "Runtime.exceptionThrown":
                d = p["exceptionDetails"]
                said.append("exception: " + d.get("exception", {}).get("description", d.get("text", "")))
            elif e["method"] == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                said.append(p["type"] + ": " + " ".join(str(a.get("value", a.get("description", ""))) for a in p["args"]))
            elif e["method"] == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                said.append(f"{p['entry']['level']}: {p['entry']['text']} {p['entry'].get('url', '')}".strip())
        return said

    def requests(self, own: str = "") -> list[str]:
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [u for u in urls if u != own and u != "about:blank" and not u.startswith(("data:", "blob:"))]

    def pdf(self, path) -> Path:
        "Print the page to a PDF file."
        Path(path).write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True, timeout=120)["data"]))
        return Path(path)


def open_page(path, width: int = 1400, dark: bool = False, screenshot=None, ready: str = "document.documentElement.dataset.ready == 'yes'") -> dict:
    "Open one report page, wait until all its figures are drawn, and return what `Browser.open` returns."
    with Browser() as b: return b.open(path, width, dark=dark, screenshot=screenshot, ready=ready)
