"One run on one process, on two with DDP and FSDP, in several passes, stopped and resumed: the same numbers."
import json
import os
import shlex
import shutil
import time
from functools import partial
from pathlib import Path
import pytest
import torch
import torch.distributed.run as torchrun
import gpu
import kill
from conftest import begin, CONTEXT, run, to_its_end, two
from deco.config import PRESETS
from deco import checkpoint, core
from deco import train as training
from deco.core import read_tensors
from smoke import smoke

STEPS = ["--smoke", "--save-every", "160", "--sample-every", "320", "--warmup", "0", "--decay", "0",
         "--ema-decay", "0.99", "0.9", "--optimizer", "adamw"]


def forked_ranks(folder: Path) -> None:
    "Have this process's torchrun fork its processes off one with torch imported; else it is as it is."
    read = torchrun.config_from_args
    def config_from_args(args):
        config, _, words = read(args)
        config.start_method = CONTEXT.get_start_method()
        return config, torchrun_rank, [folder, *words[words.index("-m") + 1:]]
    torchrun.config_from_args = config_from_args


def torchrun_rank(folder: Path, module: str, *argv) -> None:
    "What torchrun begins; its parent is the process that forks. What it says on stderr goes into a file."
    core.PARENT = os.getppid()
    torch.set_num_threads(1)
    to_its_end(folder / f"errors{os.environ['RANK']}", module, argv, None)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    "All that the newest checkpoint holds; shares of FSDP are not put together."
    files = sorted(checkpoint.checkpoints(out)[-1].glob("*.safetensors"))
    return {k: v for path in files for k, v in read_tensors(path).items()}


def rows(out: Path) -> list[dict]:
    "The log, without how fast it was."
    return [{k: v for k, v in row.items() if k != "speed"} for row in checkpoint.read_log(out / "log.jsonl")]


def same(a: Path, b: Path) -> None:
    "Weights, averages, moments and log: bit for bit."
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert rows(a) == rows(b) and len(rows(a)) == 20


def close(a: Path, b: Path) -> None:
    "Twenty losses, within 1e-5."
    x, y = ([row["loss"] for row in rows(out)] for out in (a, b))
    assert len(x) == len(y) == 20 and max(abs(p / q - 1) for p, q in zip(x, y)) < 1e-5


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    "Twenty steps in one process, and in two (DDP)."
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("parallel")
    assert run(training, *STEPS, "--data", photos, "--images", 320, "--out", out / "one") == ""
    two("deco.train", *STEPS, "--data", photos, "--images", 320, "--out", out / "two")
    return out


def main(commands: list[str]) -> None:
    "Several trainings in one group of processes."
    with core.process_group("cpu"):
        for words in commands: training.main(shlex.split(words))


@pytest.fixture(scope="module")
def sharded(photos, tmp_path_factory):
    "Three runs with FSDP. One pair of processes does them all: how to shard is worked out once, and slowly."
    out = tmp_path_factory.mktemp("sharded")
    kinds = {"fsdp": "--micro-batch 4", "bf16": "--precision bf16", "muon": "--optimizer muon --images 160"}
    steps = [*STEPS, "--data", str(photos), "--images", "320", "--parallel", "fsdp"]
    two("test_parallel", *(shlex.join([*steps, *flags.split(), "--out", str(out / name)])
                           for name, flags in kinds.items()))
    return out


def test_same_losses(straight, sharded, photos, tmp_path):
    "The same total batch: 1 process, 2 with DDP, 2 with FSDP, 1 with two passes a step."
    steps = [*STEPS, "--data", photos, "--images", 320]
    assert run(training, *steps, "--micro-batch", 8, "--out", tmp_path / "passes") == ""
    for other in (straight / "two", sharded / "fsdp", tmp_path / "passes"): close(straight / "one", other)


def test_fsdp_in_bf16(straight, sharded):
    "Weights gathered in 16 bits, gradients summed in 32: near to one process's float32 (8 bits: 0.4 %)."
    pairs = [(a["loss"], b["loss"]) for a, b in zip(rows(straight / "one"), rows(sharded / "bf16"))]
    assert len(pairs) == 20 and max(abs(a / b - 1) for a, b in pairs) < 2**-8
    assert all(p.dtype == torch.float32 for p in tensors(sharded / "bf16").values())


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_one(straight, photos, tmp_path, workers):
    "10 + 10 steps are 20 steps, bit for bit, whoever reads the images."
    steps = [*STEPS, "--data", photos, "--workers", workers, "--out", tmp_path / "run"]
    for images in (160, 320): assert run(training, *steps, "--images", images) == ""
    same(straight / "one", tmp_path / "run")


def test_resume_two(straight, photos, tmp_path):
    steps = [*STEPS, "--data", photos, "--workers", 2, "--out", tmp_path / "run"]
    for images in (160, 320): two("deco.train", *steps, "--images", images)
    same(straight / "two", tmp_path / "run")


def test_resume_elsewhere(straight, photos, tmp_path):
    "Two processes with DDP, then two with FSDP, then one: the same losses."
    shutil.copytree(straight / "two", tmp_path / "run")
    shutil.rmtree(checkpoint.checkpoints(tmp_path / "run")[-1])                            # back to step 10
    steps = [*STEPS, "--data", photos, "--out", tmp_path / "run"]
    two("deco.train", *steps, "--images", 240, "--parallel", "fsdp")
    assert run(training, *steps, "--images", 320) == ""
    close(straight / "one", tmp_path / "run")


def test_muon(sharded, photos, tmp_path):
    "Ten steps in two processes, each with its shares of the matrices, and ten in one: as in one."
    steps = [*STEPS, "--optimizer", "muon", "--data", photos]
    assert run(training, *steps, "--images", 320, "--out", tmp_path / "one") == ""
    assert len(rows(sharded / "muon")) == 10
    assert run(training, *steps, "--images", 320, "--out", sharded / "muon") == ""
    close(tmp_path / "one", sharded / "muon")
    kept = tensors(sharded / "muon")
    assert "momentum.model.blocks.0.attn.qkv.weight" in kept and "exp_avg.model.head.linear.weight" in kept


def test_falls_back(straight, photos, tmp_path, capsys):
    "A damaged newest checkpoint: a warning that names it, and the one before is taken."
    shutil.copytree(straight / "one", tmp_path / "run")
    path = next(checkpoint.checkpoints(tmp_path / "run")[-1].glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run(training, *STEPS, "--data", photos, "--images", 320, "--out", tmp_path / "run") == ""
    assert "000000000320" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").glob("000000000320.damaged*"))
    same(straight / "one", tmp_path / "run")


def test_keep(photos, tmp_path):
    "The newest two, and every 64 images."
    flags = ["--smoke", "--data", photos, "--images", 192, "--save-every", 16, "--sample-every", 192]
    assert run(training, *flags, "--keep-every", 64, "--out", tmp_path / "run") == ""
    assert [int(p.name) for p in checkpoint.checkpoints(tmp_path / "run")] == [64, 128, 176, 192]


def test_stop_two(photos, tmp_path):
    "A scheduler's SIGTERM to torchrun: both processes stop after one step, saved; the same command goes on."
    out = tmp_path / "run"
    flags = [*STEPS, "--data", str(photos), "--out", str(out)]
    p = begin(tmp_path / "errors", "torch.distributed.run", *gpu.torchrun(2)[3:], "-m", "deco.train", *flags,
              "--images", "480000", prepare=partial(forked_ranks, tmp_path))
    deadline = time.time() + 120
    while not checkpoint.checkpoints(out) and time.time() < deadline: time.sleep(0.1)
    p.terminate()
    p.join(120)
    err = (tmp_path / "errors0").read_text("utf-8")
    seen = rows(out)[-1]["images"]
    assert p.exitcode != 0 and f"stopped and saved after {seen:,} images" in err
    assert int(checkpoint.checkpoints(out)[-1].name) == seen
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
    with pytest.raises(SystemExit) as end: kill.main(["--kills", "2", "--steps", "16"])
    assert not end.value.code and json.loads(capsys.readouterr().out)["identical"]
