"The trainer and the sampler as their users meet them: whole runs, resumed runs, and what bad input gets."
import json
import os
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
import deco
from conftest import begin, run
from deco import checkpoint
from deco import sample as sampling
from deco import train as training
from deco.config import Config, parse
from deco.core import flag, read_tensors

SMALL = ["--smoke"]


def snapshot(folder: Path) -> dict: return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    "A finished small run."
    out = tmp_path_factory.mktemp("runs") / "small"
    assert run(training, *SMALL, "--data", photos, "--out", out) == ""
    return out


def rows(folder: Path) -> list[dict]:
    "The log of a run."
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    "All that the newest checkpoint holds."
    files = sorted(checkpoint.checkpoints(folder)[-1].glob("*.safetensors"))
    return {k: v for path in files for k, v in read_tensors(path).items()}


# --- what a run leaves

def test_files(finished, capsys, photos):
    made = {p.name for p in finished.iterdir()}
    assert made >= {"samples.png", "loss.png", "model.safetensors", "config.json", "log.jsonl", "checkpoints"}
    log = rows(finished)
    assert [row["images"] for row in log] == [16, 32, 48, 64]
    assert {"mse", "freq", "lr", "grad_norm", "speed"} <= set(log[0])
    assert Image.open(finished / "samples.png").size == (4 * (8 * 18 - 2), 4 * (8 * 18 - 2))
    capsys.readouterr()
    before = weights(finished)
    assert run(training, *SMALL, "--data", photos, "--out", finished) == ""          # again: it is done
    assert "is done" in capsys.readouterr().out
    assert all(torch.equal(v, before[k]) for k, v in weights(finished).items())


def test_resume_is_exact(photos, tmp_path):
    """4 steps are bit for bit 2 steps, a new process state, and 2 more.

    (tests/test_parallel.py: 20 steps, and workers and processes.)
    """
    common = [*SMALL, "--data", photos, "--decay", "0", "--warmup", "0"]
    assert run(training, *common, "--out", tmp_path / "a") == ""
    assert run(training, *common, "--out", tmp_path / "b", "--images", "32") == ""
    assert run(training, *common, "--out", tmp_path / "b") == ""
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[row | dict(speed=None) for row in rows(tmp_path / name)] for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_interrupt_saves(photos, tmp_path):
    "A scheduler's SIGTERM: one line, exit code 143, nothing lost; the same command goes on."
    out = tmp_path / "run"
    flags = [*SMALL, "--data", str(photos), "--out", str(out), "--save-every", "64"]
    p = begin(tmp_path / "errors", "deco.train", *flags, "--images", "64000")
    deadline = time.time() + 120
    while not checkpoint.checkpoints(out) and time.time() < deadline: time.sleep(0.1)
    p.terminate()
    p.join(120)
    err = (tmp_path / "errors").read_text("utf-8")
    assert p.exitcode == 143 and "stopped and saved" in err and len(err.strip().splitlines()) == 1, err
    seen = len(rows(out)) * 16
    assert seen >= 64 and run(training, *flags, "--images", seen + 16) == ""
    assert len(rows(out)) * 16 == seen + 16


# --- bad input to training

BAD = ["--images 0", "--images many", "--batch-size 0", "--lr nan", "--lr -1", "--guidance nan", "--steps 0",
       "--freq-quality 0", "--label-drop 2", "--ema-decay 1", "--seed -1", "--size 0", "--speed 9",
       "--parallel tp", "--micro-batch 5", "--repa dino", "--device cuda:99"]
BAD = [(flags, flags.split()[0]) for flags in BAD] + [
    ("--size 20", "--size 20 must"), ("--preset nonsense", "nonsense"), ("--model deco-xxxl", "deco-toy"),
    ("--batchsize 9", "did you mean --batch-size?"), ("--image-size 9", "did you mean --size?"),
    ("--init /no/such/run", "/no/such/run"),
    ("--repa efficientnet-lite0 --repa-layer 9", "--repa-layer"),
    ("--blur -1", "--blur"), ("--model-args blur=3", "--blur"), ("--clamp-target", "prediction=x"),
    ("--model-args low_pass=-1", "low_pass"), ("--model-args asym_rank=4", "prediction=asym"),
    ("--blur 3 --model-args prediction=asym", "blur"),
    ("--blur 3 --perceptual efficientnet-lite0", "--blur"), ("--blur 3 --lpips-weight 0.1", "--blur"),
    ("--repa-norm 2", "--repa-norm"),
    ("--data /no/such/folder", "/no/such/folder")]

@pytest.mark.parametrize("flags, named", BAD)
def test_bad_flags(flags, named, photos, tmp_path):
    error = run(training, *SMALL, "--data", photos, "--out", tmp_path / "run", *flags.split())
    assert named in error and not (tmp_path / "run").exists()


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no image in" in run(training, *SMALL, "--data", tmp_path / "empty", "--out", tmp_path / "run")


def test_broken_image(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    assert "bad.png" in run(training, *SMALL, "--data", tmp_path, "--out", tmp_path / "run")


def test_other_settings(finished, photos):
    before = snapshot(finished)
    error = run(training, *SMALL, "--data", photos, "--out", finished, "--lr", "0.5")
    assert "--lr 0.004 (now 0.5)" in error and snapshot(finished) == before


def test_foreign_folder(photos, tmp_path):
    (tmp_path / "config.json").write_text('{"name": "something else"}', "utf-8")
    assert "config.json" in run(training, *SMALL, "--data", photos, "--out", tmp_path)
    (tmp_path / "config.json").write_text("{", "utf-8")
    assert "config.json" in run(training, *SMALL, "--data", photos, "--out", tmp_path)


def test_nothing_is_written_among_pictures(finished, photos, tmp_path):
    "Neither a run nor a set of images goes into a folder of somebody's photographs."
    for name in ("flat/IMG_1.jpg", "classes/cat/IMG_2.JPG"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    before = snapshot(tmp_path)
    assert "IMG_1.jpg" in run(training, *SMALL, "--data", photos, "--out", tmp_path / "flat")
    for folder, named in (("flat", "IMG_1.jpg"), ("classes", "IMG_2.JPG")):
        command = [finished, "--num-images", "9", "--steps", "2", "--out", tmp_path / folder]
        assert named in run(sampling, *command)
    assert snapshot(tmp_path) == before


def test_what_is_left_out_is_in_the_log(tmp_path, capfd):
    "A real folder holds other files too; they are counted in each row, and the rows stay rows."
    pictures, out = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    for k in range(4): Image.new("RGB", (20, 20), (60 * k, 0, 0)).save(pictures / f"{k}.png")
    (pictures / "a.heic").write_bytes(b"of a telephone")
    assert run(training, *SMALL, "--data", pictures, "--out", out) == ""
    assert rows(out)[0]["left_out"] == {".heic": 1}
    assert checkpoint.read_log(out / "log.jsonl") == rows(out)
    assert "no rows" not in capfd.readouterr().err


def test_a_slash_at_the_end(finished, photos):
    assert run(training, *SMALL, "--data", f"{photos}/", "--out", finished) == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_the_weights(finished):
    modes = {(finished / name).stat().st_mode for name in ("model.safetensors", "log.jsonl", "samples.png")}
    assert len(modes) == 1


@pytest.mark.parametrize("damage", ["truncated", "foreign", "malicious"])
def test_bad_checkpoint(damage, finished, photos, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copytree(finished, out, dirs_exist_ok=True)
    shutil.rmtree(checkpoint.checkpoints(out)[0])                                # none to fall back to
    path = next(checkpoint.checkpoints(out)[-1].glob("*.safetensors"))
    whole = path.read_bytes()
    class Mischief:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "was here"),)
    if damage == "truncated": path.write_bytes(whole[: len(whole) // 2])
    if damage == "foreign": path.write_bytes((finished / "model.safetensors").read_bytes())
    if damage == "malicious": torch.save(Mischief(), path)
    before = snapshot(out)
    error = run(training, *SMALL, "--data", photos, "--out", out, "--images", "384")
    assert "checkpoints/000000000064" in error
    assert snapshot(out) == before and not (tmp_path / "was here").exists()


def test_out_is_a_file(photos, tmp_path):
    (tmp_path / "run").write_text("mine", "utf-8")
    assert "run" in run(training, *SMALL, "--data", photos, "--out", tmp_path / "run")
    assert (tmp_path / "run").read_text("utf-8") == "mine"


def small_files():
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))


def test_full_disk(finished, photos, tmp_path):
    "No room while saving (a limit on the size of files): one line, and the files of before are whole."
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = snapshot(out)
    flags = [*SMALL, "--data", str(photos), "--out", str(out), "--images", "128"]
    p = begin(tmp_path / "errors", "deco.train", *flags, prepare=small_files)
    p.join(120)
    err = (tmp_path / "errors").read_text("utf-8")
    warning, error = err.splitlines()
    assert p.exitcode == 1 and warning.startswith("warning: its 64 images were trained for"), err
    assert error.startswith("error: cannot write") and "000000000096" in error and "make room" in error
    after = snapshot(out)
    names = ("config.json", "state.json")
    assert all(after[p] == b for p, b in before.items() if p.suffix == ".safetensors" or p.name in names)
    assert not list(out.rglob("*.tmp")) and not (out / "checkpoints" / "writing").exists()
    assert run(training, *flags) == "" and checkpoint.checkpoints(out)[-1].name == "000000000128"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody may write")
def test_nobody_may_write(photos):
    assert "/proc/run" in run(training, *SMALL, "--data", photos, "--out", "/proc/run")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_read_only(photos, tmp_path):
    tmp_path.chmod(0o500)
    try: assert "run" in run(training, *SMALL, "--data", photos, "--out", tmp_path / "run")
    finally: tmp_path.chmod(0o700)


def test_loss_not_finite(photos, tmp_path, monkeypatch):
    "A NaN stops the run before it reaches the weights, after three of them, and says on which images."
    monkeypatch.setattr(training, "flow_loss", lambda v, target: (v - target).square().mean() * float("nan"))
    error = run(training, *SMALL, "--data", photos, "--out", tmp_path / "run")
    assert "nan" in error and "--lr" in error and "in 3 steps in a row" in error and "images" in error
    saved = weights(tmp_path / "run")                              # after the second step: still the start
    assert all(torch.isfinite(v).all() for v in saved.values())


# --- sampling

def test_sample(finished, tmp_path):
    out = tmp_path / "grid.png"
    command = [finished, "--classes", "red,0", "--num-images", "6", "--steps", "2", "--columns", "3",
               "--out", out]
    assert run(sampling, *command, "--no-names") == ""
    assert Image.open(out).size == (2 * (3 * 18 - 2), 2 * (2 * 18 - 2))
    first = out.read_bytes()
    assert run(sampling, *command, "--no-names", "--batch-size", "4") == "" and out.read_bytes() == first
    assert run(sampling, *command) == ""
    assert Image.open(out).size == (2 * (3 * 18 - 2), 2 * (2 * 18 - 2 + 12))       # with names below


def test_sample_set(finished, tmp_path):
    "A .npz and its folder: gone on with after a loss, refused with other settings, left alone by a mistake."
    command = [finished, "--num-images", "9", "--steps", "2", "--batch-size", "4", "--labels", "random"]
    assert run(sampling, *command, "--out", tmp_path / "s.npz") == ""
    with np.load(tmp_path / "s.npz") as f: first = f["arr_0"]
    assert first.shape == (9, 16, 16, 3) and first.dtype == np.uint8 and first.std() > 1
    (tmp_path / "s" / "000005.png").unlink()
    (tmp_path / "s.npz").unlink()
    assert run(sampling, *command, "--out", tmp_path / "s.npz") == ""
    with np.load(tmp_path / "s.npz") as f: assert np.array_equal(f["arr_0"], first)
    before = snapshot(tmp_path)
    assert "seed 0 (now 1)" in run(sampling, *command, "--out", tmp_path / "s", "--seed", "1")
    assert snapshot(tmp_path) == before
    (tmp_path / "s" / "samples.json").write_text("{", "utf-8")
    assert "samples.json" in run(sampling, *command, "--out", tmp_path / "s")


SAMPLE_BAD = [("--classes 7", "7"), ("--classes gren", "gren"), ("--steps 0", "steps"),
              ("--guidance nan", "guidance"),
              ("--solver rk9", "rk9"), ("--order 5", "--order"), ("--labels odd", "--labels"),
              ("--weak /no/run", "/no/run"), ("--interval 0.9 0.1", "interval"), ("--shift 0", "shift"),
              ("--num-images 0", "--num-images"), ("--batch-size 0", "--batch-size"), ("--ema 0.5", "--ema"),
              ("--labels data --classes 7", "7"), ("--seed -1", "--seed"), ("--device nonsense", "--device"),
              ("--out /dev/null/grid.png", "/dev/null")]

@pytest.mark.parametrize("flags, named", SAMPLE_BAD)
def test_sample_bad(flags, named, finished, tmp_path):
    out = tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(out, exif=sampling._EXIF)                 # an earlier grid
    before = out.read_bytes()
    common = ["--steps", "2", "--num-images", "2", "--out", out]
    assert named in run(sampling, finished, *common, *flags.split())
    assert out.read_bytes() == before


def test_sample_needs_a_run(tmp_path): assert "config.json" in run(sampling, tmp_path)


def test_sample_bare_model(tmp_path):
    "A folder that deco.save made without saying more: classes are numbers, and the size is asked for."
    deco.save(tmp_path, deco.create("deco-tiny", num_classes=3))
    assert "size" in run(sampling, tmp_path, "--out", tmp_path / "grid.png")
    deco.save(tmp_path, deco.create("deco-tiny", num_classes=3), dict(size=16))
    flags = ["--num-images", "2", "--steps", "1", "--classes", "2"]
    assert run(sampling, tmp_path, "--out", tmp_path / "grid.png", *flags) == ""


def test_sample_truncated(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes()[:5000])
    assert "model.safetensors" in run(sampling, tmp_path)


# --- the package

def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit): parse(["--help"])
    text = capsys.readouterr().out
    assert all(flag(f.name) in text for f in fields(Config))


def test_dry_run(tmp_path, capsys):
    assert run(training, "--dry-run", "--out", tmp_path / "run", "--lr", "0.1") == ""
    assert '"lr": 0.1' in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_model_args(photos, tmp_path):
    "Changes to the model reach it, are kept with the run, and are refused where they make no sense."
    small = [*SMALL, "--data", photos, "--images", "16", "--out", tmp_path / "run"]
    assert run(training, *small, "--model-args", "depth=1, decoder_patch=2,prediction=x") == ""
    model, info = deco.load(tmp_path / "run")
    assert len(model.blocks) == 1 and model.config["decoder_patch"] == 2 and model.config["prediction"] == "x"
    assert info["train"]["model_args"] == "depth=1, decoder_patch=2,prediction=x"
    assert "--model-args" in run(training, *small)                             # the run was made with others
    new = [*SMALL, "--data", photos, "--images", "16", "--out", tmp_path / "no"]
    wrong = {"depth": "name=value", "dept=1": "dept", "prediction=y": "prediction",
             "decoder_patch=3": "decoder_patch"}
    for text, word in wrong.items(): assert word in run(training, *new, "--model-args", text)


def test_weights_of_the_losses(photos, tmp_path):
    "--mse-weight 2 logs a loss of 2 mse + freq."
    flags = ["--data", photos, "--images", "16", "--mse-weight", "2"]
    assert run(training, *SMALL, *flags, "--out", tmp_path / "run") == ""
    row, = rows(tmp_path / "run")
    assert row["loss"] == pytest.approx(2 * row["mse"] + row["freq"])


def test_lpips(photos, tmp_path, monkeypatch):
    "LPIPS is asked of both pictures, enlarged so that a patch has 16 pixels, and weighed as told."
    class LPIPS(nn.Module):
        def __init__(self, net, verbose): super().__init__()
        def forward(self, a, b):
            assert a.shape[-1] == b.shape[-1] == 32                         # 16 pixels, patches of 8
            return torch.full((len(a), 1, 1, 1), 3.0) + 0 * a.sum()
    flags = ["--data", photos, "--images", "16", "--lpips-weight", "0.1", "--perceptual-from", "0"]
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    assert run(training, *SMALL, *flags, "--out", tmp_path / "run") == ""
    row, = rows(tmp_path / "run")
    assert row["lpips"] == pytest.approx(3) and row["loss"] == pytest.approx(row["mse"] + row["freq"] + 0.3)
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "pip install lpips" in run(training, *SMALL, *flags, "--out", tmp_path / "no")
