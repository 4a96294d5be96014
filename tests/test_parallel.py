"One run on one process, on two with DDP and FSDP, in several passes, stopped and resumed: the same numbers."
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
import pytest
import torch
import gpu
import kill
from conftest import run, two
from deco.config import PRESETS
from deco import train as training
from deco.core import read_tensors
from smoke import smoke

STEPS = ["--smoke", "--save-every", "240", "--sample-every", "480", "--warmup", "0", "--decay", "0",
         "--ema-decay", "0.99", "0.9"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def start_two(*argv) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [*gpu.torchrun(2), *map(str, argv)]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8", env=ONE_THREAD)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    "All that the newest checkpoint holds; shares of FSDP are not put together."
    files = sorted(training.checkpoints(out)[-1].glob("*.safetensors"))
    return {k: v for path in files for k, v in read_tensors(path).items()}


def rows(out: Path) -> list[dict]:
    "The log, without how fast it was."
    return [{k: v for k, v in row.items() if k != "speed"} for row in training.read_log(out / "log.jsonl")]


def same(a: Path, b: Path) -> None:
    "Weights, averages, moments and log: bit for bit."
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert rows(a) == rows(b) and len(rows(a)) == 30


def close(a: Path, b: Path) -> None:
    "Thirty losses, within 1e-5."
    x, y = ([row["loss"] for row in rows(out)] for out in (a, b))
    assert len(x) == len(y) == 30 and max(abs(p / q - 1) for p, q in zip(x, y)) < 1e-5


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    "Thirty steps in one process, and in two (DDP)."
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("parallel")
    assert run(training, *STEPS, "--data", photos, "--images", 480, "--out", out / "one") == ""
    two("deco.train", *STEPS, "--data", photos, "--images", 480, "--out", out / "two")
    return out


def test_same_losses(straight, photos, tmp_path):
    "The same total batch: 1 process, 2 with DDP, 2 with FSDP, 1 with two passes a step."
    steps = [*STEPS, "--data", photos, "--images", 480]
    assert run(training, *steps, "--micro-batch", 8, "--out", tmp_path / "passes") == ""
    two("deco.train", *steps, "--parallel", "fsdp", "--micro-batch", 4, "--out", tmp_path / "fsdp")
    for other in (straight / "two", tmp_path / "fsdp", tmp_path / "passes"): close(straight / "one", other)


def test_fsdp_in_bf16(straight, photos, tmp_path):
    "Weights gathered in 16 bits, gradients summed in 32: near to one process's float32 (8 bits: 0.4 %)."
    steps = [*STEPS, "--data", photos, "--images", 480]
    flags = "--parallel", "fsdp", "--precision", "bf16"
    two("deco.train", *steps, *flags, "--out", tmp_path / "run")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(rows(straight / "one"), rows(tmp_path / "run"))]
    assert len(pairs) == 30 and max(abs(a / b - 1) for a, b in pairs) < 2**-8
    assert all(p.dtype == torch.float32 for p in tensors(tmp_path / "run").values())


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_one(straight, photos, tmp_path, workers):
    "15 + 15 steps are 30 steps, bit for bit, whoever reads the images."
    steps = [*STEPS, "--data", photos, "--workers", workers, "--out", tmp_path / "run"]
    for images in (240, 480): assert run(training, *steps, "--images", images) == ""
    same(straight / "one", tmp_path / "run")


def test_resume_two(straight, photos, tmp_path):
    steps = [*STEPS, "--data", photos, "--workers", 2, "--out", tmp_path / "run"]
    for images in (240, 480): two("deco.train", *steps, "--images", images)
    same(straight / "two", tmp_path / "run")


def test_resume_elsewhere(straight, photos, tmp_path):
    "Two processes with DDP, then two with FSDP, then one: the same losses."
    shutil.copytree(straight / "two", tmp_path / "run")
    shutil.rmtree(training.checkpoints(tmp_path / "run")[-1])                            # back to step 15
    steps = [*STEPS, "--data", photos, "--out", tmp_path / "run"]
    two("deco.train", *steps, "--images", 400, "--parallel", "fsdp")
    assert run(training, *steps, "--images", 480) == ""
    close(straight / "one", tmp_path / "run")


def test_muon(photos, tmp_path):
    "Fifteen steps in two processes, each with its shares of the matrices, and fifteen in one: as in one."
    steps = [*STEPS, "--optimizer", "muon", "--data", photos]
    assert run(training, *steps, "--images", 480, "--out", tmp_path / "one") == ""
    two("deco.train", *steps, "--images", 240, "--parallel", "fsdp", "--out", tmp_path / "run")
    assert run(training, *steps, "--images", 480, "--out", tmp_path / "run") == ""
    close(tmp_path / "one", tmp_path / "run")
    kept = tensors(tmp_path / "run")
    assert "momentum.model.blocks.0.attn.qkv.weight" in kept and "exp_avg.model.head.linear.weight" in kept


def test_falls_back(straight, photos, tmp_path, capsys):
    "A damaged newest checkpoint: a warning that names it, and the one before is taken."
    shutil.copytree(straight / "one", tmp_path / "run")
    path = next(training.checkpoints(tmp_path / "run")[-1].glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run(training, *STEPS, "--data", photos, "--images", 480, "--out", tmp_path / "run") == ""
    assert "000000000480" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").glob("000000000480.damaged*"))
    same(straight / "one", tmp_path / "run")


def test_keep(photos, tmp_path):
    "The newest two, and every 64 images."
    flags = ["--smoke", "--data", photos, "--images", 192, "--save-every", 16, "--sample-every", 192]
    assert run(training, *flags, "--keep-every", 64, "--out", tmp_path / "run") == ""
    assert [int(p.name) for p in training.checkpoints(tmp_path / "run")] == [64, 128, 176, 192]


def test_stop_two(photos, tmp_path):
    "A scheduler's SIGTERM to torchrun: both processes stop after one step, saved; the same command goes on."
    out = tmp_path / "run"
    flags = [*STEPS, "--data", str(photos), "--out", str(out)]
    p = start_two("-m", "deco.train", *flags, "--images", "480000")
    deadline = time.time() + 120
    while not training.checkpoints(out) and time.time() < deadline: time.sleep(0.1)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=120)
    seen = rows(out)[-1]["images"]
    assert p.returncode != 0 and f"stopped and saved after {seen:,} images" in err
    assert int(training.checkpoints(out)[-1].name) == seen
    assert run(training, *flags, "--images", seen + 16) == "" and rows(out)[-1]["images"] == seen + 16


def test_init(straight, photos, tmp_path):
    "A run may start from another's weights, of another image size; wrong ones are refused."
    start = ["--smoke", "--data", photos, "--init", straight / "one", "--size", "32", "--images", "16"]
    assert run(training, *start, "--lr", "1e-9", "--warmup", "0", "--out", tmp_path / "run") == ""
    a, b = (read_tensors(folder / "model.safetensors") for folder in (straight / "one", tmp_path / "run"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert "does not fit" in run(training, *start, "--out", tmp_path / "other", "--model", "deco-toy")


def test_smoke_two(captioned, tmp_path):
    "A preset, shrunk: train, draw, save, resume, sample, evaluate within four steps, in two processes."
    for_classes, for_prompts = "deco-l-256", "t2i-256"                                   # DDP, FSDP
    two("smoke", tmp_path, captioned, for_classes, for_prompts)


def test_smoke_one(captioned, tmp_path):
    "The same alone."
    smoke("scenes", tmp_path, str(captioned), "ddp")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_a_step(preset, captioned, data_root, tmp_path):
    flags = ["--preset", preset, "--smoke", "--images", 16, "--data-root", data_root]
    if "text" in PRESETS[preset]: flags += ["--data", captioned]
    assert run(training, *flags, "--out", tmp_path / "run") == "" and rows(tmp_path / "run")[-1]["step"] == 1


def test_killed(capsys):
    "SIGKILL at random moments; the end is that of an undisturbed run (tools/kill.py does it twenty times)."
    with pytest.raises(SystemExit) as end: kill.main(["--kills", "2", "--steps", "24"])
    assert not end.value.code and json.loads(capsys.readouterr().out)["identical"]
