"""Run the notebooks in place, check that their saved outputs are fresh, render the README.

    python tools/notebooks.py run [nbs/01_dct.ipynb ...]      execute, save outputs, clean
    python tools/notebooks.py check [nbs/01_dct.ipynb ...]    execute a copy and compare with what is saved
    python tools/notebooks.py readme [--check]                README.md from nbs/index.ipynb

Cells with `#| eval: false` or a flag of `tst_flags` in settings.ini (`slow`, `gpu`) are left as they are, as
`nbdev_test` leaves them.
"""
import argparse
import base64
import copy
import io
import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.I)


def skipped(cell) -> bool:
    "Is this a cell that a run leaves alone?"
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    directives = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, re.M)
    return any(d.replace(" ", "") == "eval:false" or d in config["DEFAULT"]["tst_flags"].split() for d in directives)


def execute(nb):
    "Run every cell that is not skipped in a fresh kernel, with nbs/ as its folder; the first error stops."
    client = NotebookClient(nb, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}})
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != "code" or skipped(cell): continue
            client.execute_cell(cell, i)
            cell.outputs = [o for o in cell.outputs if not progress_bar(o) and o.get("name") != "stderr"]     # libraries' log lines
            for o in cell.outputs:
                if "image/png" in o.get("data", {}): o.data["image/png"] = smaller(o.data["image/png"])
    return nb


def smaller(png: str) -> str:
    """A picture (base64 PNG) with a palette of 256 colours, where that takes fewer bytes and is to the eye the same.

    Charts are. A photograph or a smooth shade would lose tones, and stays as it is unless it is large.
    """
    image, buffer = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    lost = max(ImageStat.Stat(ImageChops.difference(image, few.convert("RGB"))).rms)         # of 255
    if lost > 2 and len(png) < 100_000: return png
    few.save(buffer, "PNG", optimize=True)
    return min(png, base64.b64encode(buffer.getvalue()).decode() + "\n", key=len)


def progress_bar(output) -> bool:
    "Is this what a finished progress bar leaves? It is there or not, as the machine is slow or fast."
    return output.output_type == "display_data" and set(output.data) == {"text/html", "text/plain"} and "HTML object" in output.data["text/plain"]


def outputs(cell):
    "What a cell shows, as (kind, {MIME type: text}) with neighbouring stream parts joined."
    shown = []
    for o in cell.get("outputs", []):
        if o.output_type == "stream":
            if shown and shown[-1][0] == "stream" + o.name: shown[-1][1]["text/plain"] += o.text
            else: shown.append(("stream" + o.name, {"text/plain": o.text}))
        elif o.output_type == "error": shown.append(("error", {"text/plain": o.evalue}))
        else: shown.append((o.output_type, dict(o.data)))
    return shown


def differs(old: str, new: str, rtol: float) -> bool:
    "Do two texts differ, beyond numbers that agree within rtol?"
    if NUMBER.sub("#", old) != NUMBER.sub("#", new): return True
    pairs = zip(map(float, NUMBER.findall(old)), map(float, NUMBER.findall(new)))
    return any(abs(a - b) > rtol * max(abs(a), abs(b)) + 1e-4 for a, b in pairs)


def stale(saved, fresh, rtol: float = 0.02) -> list[str]:
    """Cells whose saved outputs a new run does not reproduce; pictures count by their presence.

    A cell that reports times or memory says `#| timing`, one that shows rounding errors, which differ from processor to
    processor, says `#| rounding`; both are compared by the kinds of their outputs alone.
    """
    found = []
    for i, (a, b) in enumerate(zip(saved.cells, fresh.cells)):
        if a.cell_type != "code" or skipped(a): continue
        old, new = outputs(a), outputs(b)
        if [(k, sorted(d)) for k, d in old] != [(k, sorted(d)) for k, d in new]: found.append(f"cell {i}: other kinds of output")
        elif re.search(r"^#\|\s*(timing|rounding)", a.source, re.M): continue
        elif any(differs(x[kind], y[kind], rtol) for (_, x), (_, y) in zip(old, new) for kind in ("text/plain", "text/markdown") if kind in x):
            found.append(f"cell {i}: other text\n  saved: {old}\n  fresh: {new}"[:800])
    return found


def render_readme() -> str:
    "README.md: the text of index.ipynb, its code as blocks and its printed outputs below."
    parts = ["<!-- Made from nbs/index.ipynb by `python tools/notebooks.py readme`. Change it there. -->"]
    for cell in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells:
        source = "\n".join(l for l in cell.source.splitlines() if not l.startswith("#|")).strip()
        if "#| hide" in cell.source or not source: continue
        source = re.sub(r"(\]\(|\")(?=(images|results)/|\w+\.ipynb)", r"\1nbs/", source)        # paths as seen from the top
        parts.append(source if cell.cell_type == "markdown" else f"```python\n{source}\n```")
        text = "".join(d.get("text/plain", "") for k, d in outputs(cell) if k == "streamstdout") if cell.cell_type == "code" else ""
        if text.strip(): parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "check", "readme"))
    parser.add_argument("paths", nargs="*", help="notebooks (default: all)")
    parser.add_argument("--check", action="store_true", help="readme: compare, write nothing")
    args = parser.parse_args()
    if args.command == "readme":
        path, text = ROOT / "README.md", render_readme()
        if args.check: sys.exit(0 if path.read_text() == text else "README.md is not what nbs/index.ipynb gives: run `python tools/notebooks.py readme`")
        return path.write_text(text)
    failed = False
    for path in [Path(p) for p in args.paths] or sorted((ROOT / "nbs").glob("*.ipynb")):
        saved, start = nbformat.read(path, 4), time.time()
        fresh = execute(copy.deepcopy(saved))
        if args.command == "run":
            nbformat.write(fresh, path)
            subprocess.run(["nbdev_clean", "--fname", str(path)], check=True, cwd=ROOT)
            found = []
        else: found = stale(saved, fresh)
        failed |= bool(found)
        print(f"{path.name}: {time.time() - start:.0f} s" + "".join(f"\n  {f}" for f in found), flush=True)
    sys.exit("saved outputs are not what a run gives: `python tools/notebooks.py run`, then look at them" if failed else 0)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"       # figures are outputs, also where a script asked for Agg
    main()
