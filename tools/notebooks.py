"""Run the notebooks in place, check that their saved outputs are fresh, render the README.

    python tools/notebooks.py run [nbs/02_dct.ipynb ...]      execute, save outputs, clean
    python tools/notebooks.py check [nbs/02_dct.ipynb ...]    execute a copy and compare with what is saved
    python tools/notebooks.py readme [--check]                README.md from nbs/index.ipynb

A run of index.ipynb writes README.md too, and a check of it compares it.
`--jobs 2` runs two notebooks at once, each with its share of the cores; `--also COMMAND` takes its turn
before them. Cells with `#| eval: false` or a flag of `tst_flags` in settings.ini (`slow`, `gpu`) are left as
they are, as `nbdev_test` leaves them. `check` leaves out the export too: it would write a module while
another notebook imports it.
"""
import argparse
import base64
import copy
import gc
import io
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple
import nbformat
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.I)


# --- the kernels' processes

LIBRARIES = ["debugpy", "ipykernel.kernelapp", "matplotlib.pyplot", "nbclient", "nbformat", "scipy.stats",
             "torch", "torch.distributed.fsdp", "torchvision",
             "transformers.models.bert.modeling_bert"]                         # seconds each, and not ours


class Forked:
    "A kernel forked off a process that has the large libraries imported. To Jupyter it is a `Popen`."
    stdin = stdout = stderr = None

    def __init__(self, cmd: list[str], env: dict[str, str], cwd: str, **_):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        here, there = context.Pipe()
        self.process = context.Process(target=kernel, args=(cmd[cmd.index("-f"):], env, cwd, there))
        self.process.start()
        here.recv()                                             # it has a process group of its own
        self.pid = self.process.pid

    def poll(self) -> int | None: return self.process.exitcode
    def send_signal(self, number: int) -> None: os.kill(self.pid, number)
    def terminate(self) -> None: self.process.terminate()
    def kill(self) -> None: self.process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode


def kernel(arguments: list[str], env: dict[str, str], cwd: str, ready) -> None:
    "Be a kernel, as `python -m ipykernel_launcher` is one."
    from ipykernel import kernelapp
    gc.freeze()                                 # each collection would look through all the libraries again
    os.setsid()
    ready.send(True)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["ipykernel_launcher", *arguments]
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    kernelapp.launch_new_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])


# --- running

def skipped(cell) -> bool:
    "Is this a cell that a run leaves alone?"
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    flags = config["DEFAULT"]["tst_flags"].split()
    directives = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, re.M)
    return any(d.replace(" ", "") == "eval:false" or d in flags for d in directives)


def execute(nb, export: bool = True):
    "Run every cell that is not skipped in a fresh kernel, with nbs/ as its folder; the first error stops."
    place = {"metadata": {"path": str(ROOT / "nbs")}}
    # A check compares no pictures: each is drawn once, and not before it to find the margins that can go.
    margins = [] if export else ["--InlineBackend.print_figure_kwargs={'bbox_inches': None}"]
    client = NotebookClient(nb, timeout=900, kernel_name="python3", resources=place, extra_arguments=margins)
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != "code" or skipped(cell): continue
            if "nbdev_export()" in cell.source and not export: continue
            client.execute_cell(cell, i)
            # libraries write log lines to stderr
            cell.outputs = [o for o in cell.outputs if not progress_bar(o) and o.get("name") != "stderr"]
            for o in cell.outputs:
                if "image/png" in o.get("data", {}): o.data["image/png"] = smaller(o.data["image/png"])
    return nb


def is_setting_up(source: str) -> bool:
    "Is this a cell of imports, perhaps with what figures need? A reader can do without it."
    source = re.sub(r"^#\|.*\n", "", source, flags=re.M).strip()
    imports_alone = not re.search(r"^(?!import |from |#|\))\S", source, re.M)
    return source.startswith(("import ", "from ")) and (imports_alone or "from helpers import" in source)


def fold(nb) -> None:
    "Hide the cells of imports in JupyterLab and on the site: a click opens one."
    for cell in nb.cells:
        cell.metadata.pop("jupyter", None)
        hidden = cell.cell_type == "code" and is_setting_up(cell.source)
        if hidden: cell.metadata["jupyter"] = {"source_hidden": True}


def smaller(png: str) -> str:
    """A picture (base64 PNG) with a palette of 256 colours, where that is smaller and to the eye the same.

    Charts are. A photograph or a smooth shade would lose tones, and stays as it is unless it is large.
    """
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    lost = max(ImageStat.Stat(ImageChops.difference(image, few.convert("RGB"))).rms)         # of 255
    if lost > 2 and len(png) < 100_000: return png
    buffer = io.BytesIO()
    few.save(buffer, "PNG", optimize=True)
    return min(png, base64.b64encode(buffer.getvalue()).decode() + "\n", key=len)


def progress_bar(output) -> bool:
    "Is this what a finished progress bar leaves? It is there or not, as the machine is slow or fast."
    if output.output_type != "display_data" or set(output.data) != {"text/html", "text/plain"}: return False
    return "HTML object" in output.data["text/plain"]


# --- comparing

def outputs(cell) -> list[tuple[str, dict]]:
    "What a cell shows, as (kind, {MIME type: content}) with neighbouring stream parts joined."
    shows = []
    for o in cell.get("outputs", []):
        if o.output_type == "stream":
            if shows and shows[-1][0] == "stream" + o.name: shows[-1][1]["text/plain"] += o.text
            else: shows.append(("stream" + o.name, {"text/plain": o.text}))
        elif o.output_type == "error": shows.append(("error", {"text/plain": o.evalue}))
        else: shows.append((o.output_type, dict(o.data)))
    return shows


def texts(shows: list[tuple[str, dict]]) -> list[str]:
    "What of these outputs is compared as text: all but pictures, so Markdown and HTML too."
    parts = [part for _, data in shows for part in sorted(data.items())]
    return [str(content) for mime, content in parts if not mime.startswith("image/")]


def differs(old: str, new: str, rtol: float) -> bool:
    "Do two texts differ, beyond numbers that agree within rtol?"
    if NUMBER.sub("#", old) != NUMBER.sub("#", new): return True
    pairs = zip(map(float, NUMBER.findall(old)), map(float, NUMBER.findall(new)))
    return any(abs(a - b) > rtol * max(abs(a), abs(b)) + 1e-4 for a, b in pairs)


def stale(saved, fresh, rtol: float = 0.02) -> list[str]:
    """Cells whose saved outputs a new run does not give again, a text for each; pictures count by presence.

    A cell that reports times or memory says `#| timing`, one that shows rounding errors, which differ from
    processor to processor, says `#| rounding`; both are compared by the kinds of their outputs alone.
    """
    if len(saved.cells) != len(fresh.cells): return ["another number of cells"]
    problems = []
    for i, (a, b) in enumerate(zip(saved.cells, fresh.cells)):
        if a.cell_type != "code" or skipped(a): continue
        old, new = outputs(a), outputs(b)
        kinds = [[(kind, sorted(data)) for kind, data in shows] for shows in (old, new)]
        if kinds[0] != kinds[1]: problems.append(f"cell {i}: other kinds of output")
        elif re.search(r"^#\|\s*(timing|rounding)", a.source, re.M): continue
        elif any(differs(x, y, rtol) for x, y in zip(texts(old), texts(new))):
            problems.append(f"cell {i}: other text\n  saved: {texts(old)}\n  fresh: {texts(new)}"[:800])
    return problems


# --- one notebook after the other, or several at once

class Report(NamedTuple):
    name: str
    seconds: float
    problems: list[str]


def refresh(path: Path, save: bool) -> Report:
    "Execute a notebook; save its outputs, or compare them with what is saved. An error is a problem too."
    start = time.time()
    saved = nbformat.read(path, 4)
    problems = []
    try:
        fresh = execute(copy.deepcopy(saved), export=save)
        if not save: problems = stale(saved, fresh)
    except (CellExecutionError, DeadKernelError, TimeoutError) as e:
        problems = [f"{type(e).__name__}: {str(e)[-3000:]}"]
    if save and not problems:
        fold(fresh)
        nbformat.write(fresh, path)
        subprocess.run(["nbdev_clean", "--fname", str(path)], check=True, cwd=ROOT)
    return Report(path.name, time.time() - start, problems)


def command(line: str) -> Report:
    "Run a command of the shell, and show what it printed when it has ended."
    start = time.time()
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", errors="replace", cwd=ROOT)
    print(done.stdout, flush=True)
    return Report(line, time.time() - start, [f"exit code {done.returncode}"] if done.returncode else [])


def refresh_all(paths: list[Path], save: bool, jobs: int, also: list[str]) -> Iterator[Report]:
    "Run commands, then notebooks, so many at once, each in a process of its own; give reports as they end."
    if jobs > 1: os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))      # inherited
    if sys.platform == "linux" and len(paths) > 1: local_provisioner.launch_kernel = Forked
    with ThreadPoolExecutor(jobs) as pool:                     # threads that wait for processes
        futures = [*(pool.submit(command, line) for line in also),
                   *(pool.submit(refresh, path, save) for path in paths)]
        for future in as_completed(futures): yield future.result()


# --- the README

def render_readme() -> str:
    "README.md: the text of index.ipynb, its code as blocks and its printed outputs below."
    parts = ["<!-- Made from nbs/index.ipynb by `python tools/notebooks.py readme`. Change it there. -->"]
    for cell in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells:
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if "#| hide" in cell.source or not source: continue
        # paths as seen from the top
        source = re.sub(r"(\]\(|\")(?=(images|results)/|\w+\.ipynb)", r"\1nbs/", source)
        if cell.cell_type == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join(data["text/plain"] for kind, data in outputs(cell) if kind == "streamstdout")
        if printed.strip(): parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def readme(check: bool) -> None:
    "Write README.md, or end with a complaint where it is not what index.ipynb gives."
    path, text = ROOT / "README.md", render_readme()
    if not check: path.write_text(text, "utf-8")
    elif path.read_text("utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb gives: run `python tools/notebooks.py readme`")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=("run", "check", "readme"))
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all)")
    parser.add_argument("--check", action="store_true", help="readme: compare, write nothing")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once (default: 1)")
    parser.add_argument("--also", action="append", default=[], help="a command, run before the notebooks")
    args = parser.parse_intermixed_args()            # --jobs may stand before the paths
    if args.command == "readme": return readme(args.check)
    paths = args.paths or sorted((ROOT / "nbs").glob("*.ipynb"))
    failed = False
    for report in refresh_all(paths, args.command == "run", args.jobs, args.also):
        failed |= bool(report.problems)
        problems = "".join(f"\n  {p}" for p in report.problems)
        print(f"{report.name}: {report.seconds:.0f} s{problems}", flush=True)
    if failed:
        sys.exit("saved outputs are not what a run gives: `python tools/notebooks.py run`, then look at them")
    if "index.ipynb" in [path.name for path in paths]: readme(check=args.command == "check")


if __name__ == "__main__":
    # figures are outputs, also where a script asked for Agg
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    main()
