"""Checks the links of a built site: `python .ci/links.py site`. Every internal link and anchor must lead somewhere, no page may load anything from another host, and links that lead outside
must be well formed (they are not opened: no network is needed). Prints what is wrong, and exits with 1."""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("object", "data")}


class Page(HTMLParser):
    "Anchors and links of one page."
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.twice, self.links, self.loads = set(), set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        for key in {a.get("id"), a.get("name") if tag == "a" else None} - {None}:
            if key in self.ids and not key.startswith("__"): self.twice.add(key)
            self.ids.add(key)
        if tag == "a" and a.get("href") is not None: self.links.append(a["href"])
        for name in ("src", "href", "data"):
            if (tag, name) in LOADS and a.get(name) and not (tag == "link" and a.get("rel") in ("canonical", "prev", "next", "edit")): self.loads.append(a[name])


def check(site: Path) -> list[str]:
    "What is wrong, a line each."
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        say = lambda text, path=path: wrong.append(f"{path.relative_to(site)}: {text}")
        for key in sorted(page.twice): say(f"two elements have the id {key!r}")
        for link in [*page.links, *page.loads]:
            u = urlsplit(link)
            if u.scheme in ("data", "mailto", "javascript"): continue
            if u.scheme or u.netloc:
                if link in page.loads: say(f"loads {link} from another host")
                if u.scheme not in ("http", "https") or "." not in u.netloc or any(ch.isspace() for ch in link): say(f"{link!r} is no address")
                continue
            target = path if not u.path else (site / unquote(u.path).lstrip("/") if u.path.startswith("/") else path.parent / unquote(u.path)).resolve()
            if target.is_dir(): target /= "index.html"
            if not target.is_file(): say(f"{link} leads to no file")
            elif not target.is_relative_to(site.resolve()): say(f"{link} leads out of the site")
            elif u.fragment and target.suffix == ".html" and unquote(u.fragment) not in (page if target == path else pages[target]).ids: say(f"{link}: no such place in that page")
    return wrong


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    found = check(folder)
    print("\n".join(found) or f"all links of {len(list(folder.rglob('*.html')))} pages lead somewhere")
    sys.exit(bool(found))
