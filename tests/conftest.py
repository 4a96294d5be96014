import io
import sys
import tarfile
from pathlib import Path
import pytest
import torch
from PIL import Image
from deco.core import run_command

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


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)
