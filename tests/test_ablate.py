"Rows of tables: each trains, draws and is measured; a stopped table goes on; summaries are of observations."
import csv
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from conftest import run
from deco import ablate
from deco.ablate import Ablation, CLAIM, ratios, read_tidy, run_table, summarize
from deco.config import check, Config
from deco.config import parse as train_settings
from deco.core import claim
from deco.train import noise_times_coins, Run, update

WEIGHTS = Path(__file__).parent.parent / "nbs/results/metrics_classifier/model.safetensors"
CLASSIFIER = ["--extractor", "classifier", "--extractor-weights", WEIGHTS]


def small(photos, tmp_path, *rows):
    "A command that trains two steps of 4 images of 16 pixels for each row."
    return ["table1", "--rows", *rows, "--seeds", "1", "--checkpoints", "1",
            "--num-images", "8", "--steps", "1", "--images", "8", "--batch-size", "4",
            "--data", photos, "--size", "16",
            "--out", tmp_path / "runs", "--results", tmp_path / "data", *CLASSIFIER]


def test_a_table(photos, tmp_path):
    "Each of its rows trains, draws and is measured."
    assert run(ablate, *small(photos, tmp_path, "dit", "deco")) == ""
    rows = read_tidy(tmp_path / "data" / "table1.csv")
    assert [r["row"] for r in rows] == ["dit", "deco"]
    assert all(r["images"] == 8 and r["blockiness"] > 0 for r in rows)
    for row in ("dit", "deco"):
        folder = tmp_path / "runs" / f"{row}-0"
        settings = json.loads((folder / "config.json").read_text("utf-8"))["train"]
        assert all(settings[k] == v for k, v in ablate.ROWS[row].items())
        assert (folder / "samples.png").exists()
    assert (tmp_path / "data" / "table1.png").exists()


@pytest.mark.parametrize("row", ablate.ROWS)
def test_every_row_takes_a_step(row):
    cfg = Config(**ablate.ROWS[row] | dict(size=16, batch_size=4))
    check(cfg)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    trained = Run(cfg, 10, "cpu")
    log, _ = update(trained, pixels, torch.arange(4), noise_times_coins(cfg, 0, pixels.shape))
    assert log["step"] == 1 and math.isfinite(log["loss"])


def test_tables_name_known_rows():
    assert {row for rows in ablate.TABLES.values() for row in rows} == set(ablate.ROWS)


def test_resumes(photos, tmp_path, monkeypatch):
    command = small(photos, tmp_path, "dit", "deco")
    measure_run = ablate.measure_run
    train = ablate.train
    trained = []
    def stops(row, *rest):
        if row == "deco": raise KeyboardInterrupt("stopped")
        return measure_run(row, *rest)
    def train_noted(cfg):
        trained.append(Path(cfg.out).name)
        train(cfg)
    monkeypatch.setattr(ablate, "measure_run", stops)
    assert run(ablate, *command) == "stopped"
    done = tmp_path / "runs" / "dit-0" / "results.json"
    before = done.stat().st_mtime_ns
    monkeypatch.setattr(ablate, "measure_run", measure_run)
    monkeypatch.setattr(ablate, "train", train_noted)
    assert run(ablate, *command) == ""
    assert trained == ["deco-0"] and done.stat().st_mtime_ns == before
    assert run(ablate, *command) == "" and trained == ["deco-0"]     # nothing is left to do
    assert "--out" in run(ablate, *command, "--lr", "1e-4")         # another setting is another run


def test_two_processes_share(photos, tmp_path, capsys):
    "A run that another process has claimed is left to it."
    command = small(photos, tmp_path, "dit", "deco")
    with claim(tmp_path / "runs" / "dit-0", CLAIM) as holder:
        assert holder == ""
        assert run(ablate, *command) == ""
    rows = read_tidy(tmp_path / "data" / "table1.csv")
    assert [r["row"] for r in rows] == ["deco"]


def test_a_lock_ends_with_its_process(tmp_path):
    "A process that is killed keeps nothing: its run can be claimed again."
    code = ("import os, sys, time; from pathlib import Path; from deco.core import claim\n"
            "with claim(Path(sys.argv[1])) as holder:\n"
            "    if os.fork(): print(repr(holder), flush=True)\n"
            "    time.sleep(60)")
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as other:
        assert other.stdout.readline().strip() == "''"
        with claim(tmp_path) as holder: assert holder.startswith(f"process {other.pid} on ")
        other.kill()
        other.wait()
        with claim(tmp_path) as holder: assert holder == ""          # its child lives, and has not the lock
        other.stdout.close()


def test_lock_without_fcntl(tmp_path, monkeypatch):
    "Windows has msvcrt in its place, whose refusal is a PermissionError."
    locked = []
    def locking(descriptor, mode, length):
        if locked: raise PermissionError(13, "Permission denied")
        locked.append((mode, length))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with claim(tmp_path) as first, claim(tmp_path) as second: assert not first and "process" in second
    assert locked == [(2, 1)]


def test_from_python(photos, tmp_path, capsys):
    "One call trains and measures; the command finds the run done, and writes to --out without --results."
    settings = Ablation("table1", rows=("dit",), seeds=(0,), checkpoints=1, num_images=8, steps=1,
                        out=str(tmp_path / "runs"), extractor="classifier", extractor_weights=str(WEIGHTS))
    flags = ["--images", "8", "--batch-size", "4", "--data", str(photos), "--size", "16"]
    base, _ = train_settings([*ablate.BASE, *flags])
    rows = run_table(settings, base)
    assert [(r["row"], r["seed"], r["images"]) for r in rows] == [("dit", 0, 8)]
    assert "dit, seed 0" in capsys.readouterr().out
    command = small(photos, tmp_path, "dit")
    at = command.index("--results")
    assert run(ablate, *command[:at], *command[at + 2:]) == ""
    printed = capsys.readouterr().out
    assert "dit, seed 0" not in printed and f"made: {tmp_path / 'runs' / 'table1.csv'}" in printed
    assert (tmp_path / "runs" / "table1.png").exists()
    for name, wrong in dict(rows=("dit-64",), seeds=(-1,), table="table9", checkpoints=3).items():
        with pytest.raises(ValueError, match=f"--{name}"): run_table(replace(settings, **{name: wrong}), base)


def test_a_table_keeps_what_it_had(photos, tmp_path):
    "Seeds can be added later, on another machine too: observations of other runs stay in the file."
    command = small(photos, tmp_path, "dit")
    assert run(ablate, *command) == ""
    assert run(ablate, *command, "--seeds", "1,", "--out", tmp_path / "elsewhere") == ""
    rows = read_tidy(tmp_path / "data" / "table1.csv")
    assert [(r["row"], r["seed"]) for r in rows] == [("dit", 0), ("dit", 1)]
    (first,) = ablate.gather_observations(("dit",), tmp_path / "runs", tmp_path / "none.csv")
    rounded = {k: v for k, v in rows[0].items() if isinstance(v, float)}
    assert rows[0] == first | rounded


def test_bad_input(photos, tmp_path):
    command = small(photos, tmp_path, "dit")
    assert "--seeds" in run(ablate, *command, "--seeds", "0")
    assert "--seeds: 'x' names no seed" in run(ablate, *command, "--seeds", "x")
    assert "--checkpoints" in run(ablate, *command, "--checkpoints", "3")
    wanted = "error: --num-images must be a whole number from 4 to 10000000, not 3"
    assert run(ablate, *command, "--num-images", "3") == wanted
    assert "no weights" in run(ablate, *command, "--extractor-weights", tmp_path / "none.safetensors")
    assert not (tmp_path / "runs" / "dit-0" / "model.safetensors").exists()     # said before training
    assert "not in table1" in run(ablate, *small(photos, tmp_path, "dit-64"))
    assert "--sedes" in run(ablate, *command, "--sedes", "3")


def test_summary(tmp_path):
    rows = [dict(row=name, seed=s, images=n, parameters=5, **dict.fromkeys(ablate.ROW_METRICS, value * n))
            for name, values in (("a", (1.0, 3.0)), ("b", (2.0, 3.0)))
            for s, value in enumerate(values) for n in (1, 2)]
    ablate.write_tidy(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", encoding="utf-8") as f: assert len(list(csv.reader(f))) == 9
    assert read_tidy(tmp_path / "t.csv") == rows
    a, b = summarize(rows)
    assert a["fid"] == (4.0, statistics.stdev([2, 6])) and b["seeds"] == 2
    assert ratios(rows, "b", "a") == [2.0, 1.0] == ratios(rows, "b", "a", images=1)


def test_blockiness():
    "A ramp is 1 whatever the patch; jumps of 3 at the borders of a ramp of slope 1 make (1 + 3) / 1."
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    assert ablate.blockiness(ramp + ramp.mT, 8) == pytest.approx(1)
    jumps = ramp + 3 * (ramp // 8)
    assert ablate.blockiness(jumps + jumps.mT, 8) == pytest.approx(4)
    assert abs(ablate.blockiness(torch.randn(64, 3, 32, 32), 8) - 1) < 0.02
    with pytest.raises(ValueError, match="border"): ablate.blockiness(ramp, 32)
