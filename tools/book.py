"""Build the site of the notebooks, which is read in a browser without installing anything.

    python tools/book.py [--out site]      needs `pip install -e '.[docs]'`, and no network

Each notebook becomes a page, each module of `deco` one of its API. Formulas are MathML, which browsers draw
themselves. Nothing that a page needs lies elsewhere: no script, font or picture is fetched from a network.
OUT/colab has the notebooks as Colab opens them, from a branch of that name: a first cell fetches the rest.
"""
import argparse
import base64
import html
import re
import shutil
import sys
import tempfile
from pathlib import Path
import nbformat
import yaml
from latex2mathml.converter import convert
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parent.parent
NAME = "deco-diffusion/deco"
REPOSITORY = f"{NAME}/blob/main"
COLAB = f"""# A machine of Colab has neither the package nor the files beside this notebook: fetch both
!git clone -q --depth 1 https://github.com/{NAME}
%pip install -q -e ./deco
%cd deco/nbs
import sys
sys.path[:0] = ["/content/deco", "/content/deco/nbs"]"""
# Lines of 110 columns fit: on a wide screen, and all but the last few columns at 1280 pixels.
STYLE = ".md-grid { max-width: 80rem }\n.md-typeset pre > code { font-size: 0.76em }\n"
# A formula in a line of prose, which may run on in the next line, not past a blank one. $5 and $6 is none.
INLINE = r"(?<![\\$])\$(?!\s)((?:[^$\n]|\n(?!\s*\n))+?)(?<!\s)\$(?!\d)"


# --- one notebook

def mathml(formula: str, display: str) -> str:
    "A formula as MathML; what Markdown would take for emphasis is written as character references."
    text = convert(html.unescape(formula).replace("\n", " "), display=display)
    text = re.sub(r"[*_`\\|]", lambda found: f"&#{ord(found[0])};", text)
    return f"<span>{text}</span>"                               # a bare <math> would end a paragraph


def prose(text: str) -> str:
    "Markdown of a cell with its formulas as MathML and its links as the site has them; code stays as it is."
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    for i in range(0, len(parts), 2):                           # the odd ones are code
        part = re.sub(r"\$\$(.+?)\$\$", lambda m: mathml(m[1], "block"), parts[i], flags=re.S)
        part = re.sub(INLINE, lambda m: mathml(m[1], "inline"), part)
        part = re.sub(r"\]\((\w+)\.ipynb(?:#([^)]*))?\)", link, part)
        part = part.replace("](../", f"](https://github.com/{REPOSITORY}/")
        parts[i] = part
    return "".join(parts)


def link(found: re.Match) -> str:
    "A link to a notebook, as one to its page; Jupyter's anchors keep capitals, the site's have none."
    anchor = re.sub(r"[^\w\s-]", "", found[2] or "").strip().lower()
    return f"]({found[1]}.md{'#' + anchor if anchor else ''})"


def block(text: str, language: str) -> str:
    "A fenced block, with a fence that the text does not have."
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def shown(output, name: str, folder: Path) -> str:
    "What a cell shows: a picture, written into `folder`, or text."
    if output.output_type == "stream": return block(output.text, "text")
    data = output.get("data", {})
    if "image/png" in data:
        (folder / name).write_bytes(base64.b64decode(data["image/png"]))
        return f"![the figure that the cell draws](figures/{name})"
    if "text/markdown" in data: return prose(data["text/markdown"])
    if "text/plain" in data: return block(data["text/plain"], "text")
    return ""


def folded(code: str) -> str:
    "A block that is opened by a click."
    return '??? quote "imports"\n\n' + re.sub(r"^(?=.)", "    ", code, flags=re.M)


def page(path: Path, figures: Path) -> str:
    "A notebook as Markdown."
    cells = nbformat.read(path, 4).cells
    parts = []
    for number, cell in enumerate(cells):
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if "#| hide" in cell.source or not source: continue
        if cell.cell_type == "markdown":
            parts.append(prose(source))
            continue
        code = block(source, "python")
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden")              # by tools/notebooks.py
        parts.append(folded(code) if hidden else code)
        outputs = [shown(o, f"{path.stem}-{number}-{i}.png", figures) for i, o in enumerate(cell.outputs)]
        parts += filter(None, outputs)
    if path.stem[:2].isdigit():
        colab = f"https://colab.research.google.com/github/{NAME}/blob/colab/{path.name}"
        parts.insert(1, f"[Open in Colab]({colab}){{ .md-button }}")
    return "\n\n".join(parts) + "\n"


def for_colab(path: Path) -> str:
    "A notebook as Colab opens it: what it needs is fetched after its title, and its outputs stay."
    nb = nbformat.read(path, 4)
    nb.cells.insert(1, nbformat.v4.new_code_cell(COLAB, id="colab"))
    return nbformat.writes(nb)


def module(name: str) -> str:
    "The page of a module, which names its notebook."
    found = re.search(r"File to edit: \.\./nbs/(\w+)\.ipynb", (ROOT / f"deco/{name}.py").read_text("utf-8"))
    return f"# deco.{name}\n\nExplained and tested in [{found[1]}](../{found[1]}.md).\n\n::: deco.{name}\n"


# --- all of them

def navigation(index: str, modules: list[str]) -> list[dict]:
    "The parts of the map on the index page, each with its pages, then the glossary and the modules."
    nav = [{"Home": "index.md"}]
    for title, rows in re.findall(r"^\*\*(.+?)\.\*\*.*?\n\n((?:\|.*\n)+)", index, re.M):
        pages = re.findall(r"^\| \[(\w+)\]", rows, re.M)
        if pages: nav.append({title: [f"{name}.md" for name in pages]})
    return [*nav, {"Glossary": "glossary.md"}, {"API": [{name: f"api/{name}.md"} for name in modules]}]


def configuration(docs: Path, out: Path, nav: list[dict]) -> dict:
    "mkdocs's settings."
    def scheme(name, mode, icon, other):
        return dict(media=f"(prefers-color-scheme: {mode})", scheme=name,
                    toggle=dict(icon=f"material/{icon}", name=f"to {other} mode"))
    palette = [scheme("default", "light", "weather-night", "dark"),
               scheme("slate", "dark", "weather-sunny", "light")]
    features = ["navigation.footer", "navigation.top", "content.code.copy", "search.highlight"]
    docstrings = dict(docstring_style=None, show_source=True, show_root_toc_entry=False, heading_level=2,
                      members_order="source", separate_signature=True, show_signature_annotations=True,
                      filters="public")                         # what __all__ has
    python = dict(paths=[str(ROOT)], options=docstrings)
    return dict(site_name="deco", docs_dir=str(docs), site_dir=str(out), use_directory_urls=False, nav=nav,
                theme=dict(name="material", font=False, features=features, palette=palette),
                plugins=["search", {"mkdocstrings": dict(handlers=dict(python=python))}],
                extra_css=["style.css"],
                markdown_extensions=["admonition", "attr_list", "md_in_html", "tables", "pymdownx.details",
                                     "pymdownx.highlight", "pymdownx.superfences",
                                     {"toc": dict(permalink=True)}])


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site (default: site)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        docs = Path(folder) / "docs"
        for name in ("figures", "api"): (docs / name).mkdir(parents=True)
        for name in ("images", "results/openmoji"): shutil.copytree(ROOT / "nbs" / name, docs / name)
        for path in (ROOT / "nbs").glob("*.ipynb"):
            (docs / f"{path.stem}.md").write_text(page(path, docs / "figures"), "utf-8")
        modules = sorted(p.stem for p in (ROOT / "deco").glob("*.py") if not p.stem.startswith("_"))
        for name in modules: (docs / f"api/{name}.md").write_text(module(name), "utf-8")
        (docs / "style.css").write_text(STYLE, "utf-8")
        nav = navigation((docs / "index.md").read_text("utf-8"), modules)
        config = Path(folder) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(configuration(docs, args.out.resolve(), nav)), "utf-8")
        build(load_config(str(config)))
    (args.out / "colab").mkdir()
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        (args.out / "colab" / path.name).write_text(for_colab(path), "utf-8")
    print(f"made: {args.out}/index.html")


if __name__ == "__main__": sys.exit(main())
