"tools/gpu.py, rehearsed on the CPU: all of it runs, and a fault in each part is reported and survived."
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest
import timm
import torch
import deco.decoder
import deco.dit
import deco.fused
import gpu
from conftest import run
from deco import train as training


@pytest.fixture(autouse=True)
def precision():
    "Parts choose how exact a product is; the tests of other files want their own."
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def findings(part: str, folder: Path) -> list[dict]:
    "What a part notes, at the sizes of a rehearsal, in this process."
    note = gpu.Notes(folder / f"{part}.jsonl", part)
    gpu.PARTS[part][0](gpu.Bench("cpu", True, 60, folder), note)
    return [json.loads(line) for line in note.path.read_text("utf-8").splitlines()]


SMALL_ENCODER = """
import runpy, sys, timm
create = timm.create_model
timm.create_model = lambda name, **settings: create(name, depth=1, **settings)
del sys.argv[:2]
runpy.run_module("deco.train", run_name="__main__", alter_sys=True)
"""

def processes_once(folder: Path, monkeypatch) -> None:
    """The training that is stopped is a process, the others run in this one. DINOv2 has one block of twelve.

    (tests/test_parallel.py: the same gpu.torchrun begins processes.)
    """
    script = folder / "small_encoder.py"
    script.write_text(SMALL_ENCODER, "utf-8")
    create, start = timm.create_model, gpu.run_train
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, depth=1, **settings))
    def run_train(arguments, launcher, until=0):
        if until: return start(arguments, [*launcher, script], until)
        ranks = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        with mock.patch.dict(os.environ, ranks if len(launcher) > 1 else {}): text = run(training, *arguments)
        return bool(text), text
    monkeypatch.setattr(gpu, "run_train", run_train)


@pytest.mark.parametrize("part, least", [("golden", 19), ("losses", 1), ("step", 1), ("sampling", 0),
                                         ("text", 0), ("profile", 0), ("whole", 6), ("picture", 2)])
def test_part(part, least, tmp_path, monkeypatch):
    "Nothing is amiss, and so much is judged."
    processes_once(tmp_path, monkeypatch)
    rows = findings(part, tmp_path)
    assert not [row for row in rows if row["ok"] is False]
    assert len(rows) > 1 or part == "losses"
    assert sum(row["ok"] is True for row in rows) >= least
    if part == "picture":
        for name in ("deco-toy", "dit-toy"): assert (tmp_path / name / "samples.png").exists()


def fail(error):
    def f(*args, **settings): raise error
    return f


def turn_back(x, cos, sin, rotated=deco.fused._rotated): return rotated(x, cos, -sin)


MEMORY = torch.OutOfMemoryError("out of memory: 80 GiB")
FAULTS = {"golden": (deco.fused, "_rotated", turn_back, "velocity of c2i"),                    # a wrong sign
          "losses": (deco.decoder, "modulate", lambda x, shift, scale: x * math.nan, "nan"),
          "step": (torch.nn.functional, "scaled_dot_product_attention",
                   fail(NotImplementedError("no such kernel")), "no such kernel"),
          "sampling": (gpu, "sample", fail(MEMORY), "out of memory"),
          "text": (torch.optim.AdamW, "step", fail(MEMORY), "out of memory"),
          "whole": (gpu, "run_train", fail(OSError("no torchrun")), "no torchrun"),
          "picture": (gpu, "train", fail(FloatingPointError("loss nan in 3 steps in a row")), "loss nan")}


@pytest.mark.parametrize("part", FAULTS)
def test_a_fault_in_a_part(part, tmp_path, monkeypatch):
    module, name, broken, word = FAULTS[part]
    monkeypatch.setattr(module, name, broken)
    try: rows = findings(part, tmp_path)
    except Exception as e:                                       # which ends the part: the command notes it
        rows = [dict(name="the part ended", value=repr(e), ok=False)]
    bad = [f"{row['name']}: {row['value']}" for row in rows if row["ok"] is False]
    assert any(word.lower() in text.lower() for text in bad), bad


def test_the_command(tmp_path, monkeypatch):
    "A process for each part: what one of them does not survive, the others do not feel."
    fault = tmp_path / "fault.py"
    fault.write_text("import sys\nif sys.argv[1] == 'step': raise OSError('no such device')\n", "utf-8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["step", "losses", "--rehearse", "--limit", "120", "--first", fault, "--out", tmp_path]
    with pytest.raises(SystemExit) as end: gpu.main(list(map(str, command)))
    assert end.value.code == 1
    rows = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["rows"]
    bad = {row["part"]: row["value"] for row in rows if row["ok"] is False}
    assert bad.keys() == {"step"} and any(row["part"] == "losses" and row["ok"] for row in rows)
    assert "no such device" in bad["step"] and "**NO**" in (tmp_path / "gpu.md").read_text("utf-8")


def test_a_part_that_hangs(tmp_path):
    (tmp_path / "fault.py").write_text("import time\ntime.sleep(1000)\n", "utf-8")
    args = SimpleNamespace(out=tmp_path, device="cpu", rehearse=True, first=tmp_path / "fault.py")
    end, seconds = gpu.run_part("profile", 3, args)
    assert end["ok"] is False and end["value"].startswith("no end within 3 s") and seconds["value"] >= 3
