"The site of the notebooks: all pages, links that lead somewhere, nothing fetched, formulas as MathML."
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import nbformat
import pytest

pytest.importorskip("mkdocstrings", reason="needs pip install -e '.[docs]'")
pytest.importorskip("latex2mathml", reason="needs pip install -e '.[docs]'")
ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    "What a page says of itself and of others: its anchors, its links, and what a browser loads for it."
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded, self.formulas = set(), [], [], 0
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.anchors.add(attrs["id"])
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag in ("script", "img", "iframe") and attrs.get("src"): self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon"): self.loaded.append(attrs["href"])
        self.formulas += tag == "math"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("book") / "site"
    command = [sys.executable, str(ROOT / "tools/book.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.relative_to(out).as_posix(): Page(path) for path in out.rglob("*.html")}, out


def test_every_page(pages):
    for path in (ROOT / "nbs").glob("*.ipynb"): assert f"{path.stem}.html" in pages[0]
    modules = {path.stem for path in (ROOT / "deco").glob("*.py") if not path.stem.startswith("_")}
    assert {Path(name).stem for name in pages[0] if name.startswith("api/")} == modules
    assert {"deco.flow.interpolate", "deco.flow.sample"} <= pages[0]["api/flow.html"].anchors


def test_links(pages):
    "Every link within the site leads to a file, and to a place on it."
    pages, out = pages
    lost = []
    for name, page in pages.items():
        if name == "404.html": continue                         # its links begin at the server's root
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (out / name).parent / unquote(parts.path) if parts.path else out / name
            target = target.resolve()
            key = target.relative_to(out.resolve()).as_posix()
            if not target.exists(): lost.append((name, link))
            elif parts.fragment and key in pages and unquote(parts.fragment) not in pages[key].anchors:
                lost.append((name, link))
    assert not lost, lost[:20]


def test_colab(pages):
    "A page's button opens its notebook on the branch that the folder colab becomes, with all its cells."
    pages, out = pages
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        button = f"https://colab.research.google.com/github/deco-diffusion/deco/blob/colab/{path.name}"
        assert pages[f"{path.stem}.html"].links.count(button) == 1
        cells = [cell.source for cell in nbformat.read(out / "colab" / path.name, 4).cells]
        first = cells.pop(1)
        assert "git clone" in first and "%pip install" in first
        assert cells == [cell.source for cell in nbformat.read(path, 4).cells]


def test_nothing_is_fetched(pages):
    pages, out = pages
    elsewhere = [(name, source) for name, page in pages.items() for source in page.loaded
                 if urlsplit(source).scheme not in ("", "data") or urlsplit(source).netloc]
    assert not elsewhere
    styles = "".join(path.read_text("utf-8") for path in out.rglob("*.css"))
    assert not re.search(r"url\([\"']?https?:", styles)


def test_formulas(pages):
    pages, out = pages
    assert pages["03_flow.html"].formulas > 50
    left = {}
    for name in pages:
        html = (out / name).read_text("utf-8")
        prose = re.sub(r"<(code|pre|script|style).*?</\1>", "", html, flags=re.S)
        left[name] = re.findall(r"\$[^$]*\\[a-z]+|\\[a-z]{3,}", prose)
    assert not any(left.values()), {name: found[:3] for name, found in left.items() if found}
