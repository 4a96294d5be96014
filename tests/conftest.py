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


multiprocessing.set_forkserver_preload(["deco.train", "deco.evaluate", "deco.geneval"])

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
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    mp.start_processes(rank, (port, module, [str(a) for a in argv]), nprocs=2, start_method=method)


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
def data_root(tmp_path_factory):
    "Where several tests keep what is drawn and encoded once: pictures, embeddings of captions."
    return tmp_path_factory.mktemp("shared") / "data"


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)
