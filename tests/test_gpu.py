"tools/gpu.py, rehearsed on the CPU: all of it runs, and a fault in each part is reported and survived."
import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parent.parent / "tools" / "gpu.py"

FAULTS = """
import math
import sys
import time
import torch
import torch.nn.functional as F
import deco.decoder
import deco.dit

tool = sys.modules["__main__"]

def fail(error):
    def f(*args, **settings): raise error
    return f

def turn_back(x, cos, sin): return rotate(x, cos, -sin)
rotate = deco.dit.rotate

part = sys.argv[1]
if part == "golden": deco.dit.rotate = turn_back                                    # a wrong sign
if part == "losses": deco.decoder.modulate = lambda x, shift, scale: x * math.nan   # NaN
if part == "step": F.scaled_dot_product_attention = fail(NotImplementedError("no such kernel"))
if part == "sampling": tool.sample = fail(torch.OutOfMemoryError("out of memory: 80 GiB"))
if part == "text": torch.optim.AdamW.step = fail(torch.OutOfMemoryError("out of memory: 80 GiB"))
if part == "profile": time.sleep(1000)
if part == "whole": tool.run_train = fail(OSError("no torchrun"))
if part == "picture": tool.train = fail(FloatingPointError("loss nan in 3 steps in a row"))
"""


def report(out: Path, *flags) -> tuple[int, dict]:
    "Rehearse; the exit code and the report."
    command = [sys.executable, TOOL, "--rehearse", "--out", out, *flags]
    done = subprocess.run(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, encoding="utf-8")
    assert (out / "gpu.md").exists(), done.stderr[-2000:]
    return done.returncode, json.loads((out / "gpu.json").read_text("utf-8"))


def test_rehearsal(tmp_path):
    code, found = report(tmp_path)
    assert code == 0, [row for row in found["rows"] if row["ok"] is False]
    assert len({row["part"] for row in found["rows"]}) == 8
    assert sum(row["ok"] is True for row in found["rows"]) > 25
    for name in ("deco-toy", "dit-toy"): assert (tmp_path / "picture" / name / "samples.png").exists()


def test_a_fault_in_each_part(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS, "utf-8")
    code, found = report(tmp_path, "--first", tmp_path / "faults.py", "--limit", 25)
    assert code == 1
    bad = {}
    for row in found["rows"]:
        if row["ok"] is False: bad.setdefault(row["part"], []).append(f"{row['name']}: {row['value']}")
    assert len(bad) == 8, bad
    for part, word in dict(golden="velocity of c2i", losses="nan", step="no such kernel",
                           sampling="out of memory", text="out of memory", profile="no end within 25 s",
                           whole="no torchrun", picture="loss nan").items():
        assert any(word.lower() in text.lower() for text in bad[part]), (part, bad[part])
    assert "**NO**" in (tmp_path / "gpu.md").read_text("utf-8")
