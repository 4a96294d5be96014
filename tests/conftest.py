import importlib
import io
import signal
import multiprocessing
import os
import socket
import sys
import tarfile
from pathlib import Path
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from deco import STOP_SIGNALS
from deco.core import run_command

for _s in STOP_SIGNALS:                          # a shell's & and nohup: what they ignore, children would too
    if signal.getsignal(_s) == signal.SIG_IGN:
        signal.signal(_s, signal.default_int_handler if _s == signal.SIGINT else signal.SIG_DFL)

for folder in ("tests", "tools"): sys.path.insert(0, str(Path(__file__).parent.parent / folder))


def run(command, *argv) -> str:
    "Run a command's main in this process; its one-line error, or '' where all went well."
    try: run_command(lambda: command.main([str(a) for a in argv]))
    except SystemExit as e:
        assert e.code not in (0, None)
        if isinstance(e.__cause__, KeyboardInterrupt): return str(e.__cause__)          # it was stopped
        assert "\n" not in str(e.code), "more than one line"
        return str(e.code)
    return ""


multiprocessing.set_forkserver_preload(["deco.train", "deco.evaluate", "deco.geneval", "matplotlib.pyplot",
                                        "torch._dynamo", "transformers.models.bert.modeling_bert"])

METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")


def apart(f, *args):
    "What f(*args) gives in a process of its own, which begins with torch imported: at once."
    with CONTEXT.Pool(1) as pool: return pool.apply(f, args)


def begin(errors: Path, module: str, *argv, prepare=None):
    "A command in a process of its own, as `apart`; what it says on stderr goes into a file."
    process = CONTEXT.Process(target=to_its_end, args=(errors, module, [str(a) for a in argv], prepare))
    process.start()
    return process


def to_its_end(errors: Path, module: str, argv: list[str], prepare) -> None:
    "`python -m MODULE ...`, in this process."
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    if prepare: prepare()
    run_command(lambda: importlib.import_module(module).main(argv))


def rank(index: int, port: int, module: str, argv: list[str]) -> None:
    "One of two processes, with the environment that torchrun gives it, in which a command runs."
    os.environ |= dict(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    importlib.import_module(module).main(argv)


def two(module: str, *argv) -> None:
    """Run a module's main in two processes, as torchrun does. Each begins with torch imported: at once.

    What torchrun itself adds (its store, its signals) is tested in test_parallel.py.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(rank, (port, module, [str(a) for a in argv]), nprocs=2,
                       start_method=CONTEXT.get_start_method())


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    "A tar file with these members, in this order."
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    "An image folder of two classes, eight small images each."
    root = tmp_path_factory.mktemp("photos")
    for name, color in (("blue", (20, 40, 200)), ("red", (200, 30, 20))):
        (root / name).mkdir()
        for i in range(8):
            lighter = tuple(min(255, v + 5 * i) for v in color)
            Image.new("RGB", (24 + i, 20), lighter).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    "An image folder: 72 small images, each with its own caption beside it."
    root = tmp_path_factory.mktemp("captioned")
    colours = "red green blue yellow black white pink brown".split()
    things = "circle square heart flag face dog car tree moon".split()
    for i in range(72):
        Image.new("RGB", (20 + i % 9, 20), (3 * i, 100, 200 - 2 * i)).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"a {colours[i % 8]} {things[i % 9]}", "utf-8")
    return root


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    "Where several tests keep what is drawn and encoded once: pictures, embeddings of captions."
    return tmp_path_factory.mktemp("shared") / "data"


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)
