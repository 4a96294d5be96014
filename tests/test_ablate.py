"The rows of the tables: each trains, draws and is measured; a stopped runner goes on; what the summary says is what was observed."
import csv
import fcntl
import json
import statistics
from pathlib import Path
import pytest
import torch
from conftest import run
from deco import ablate

CLASSIFIER = ["--extractor", "classifier", "--extractor-weights", Path(__file__).parent.parent / "nbs/results/09_classifier/model.safetensors"]


def small(photos, tmp_path, *rows):
    "A command that trains two steps of 4 images of 16 pixels for each row."
    return ["table1", "--rows", *rows, "--seeds", "1", "--checkpoints", "1", "--images", "8", "--batch-size", "4", "--data", photos, "--size", "16",
            "--num-images", "8", "--steps", "1", "--out", tmp_path / "runs", "--results", tmp_path / "data", *CLASSIFIER]


def test_every_row_trains_and_draws(photos, tmp_path):
    for table, names in ablate.TABLES.items():
        command = small(photos, tmp_path, *names)
        assert run(ablate, table, *command[1:]) == ""
        rows = ablate.read_tidy(tmp_path / "data" / f"{table}.csv")
        assert [r["row"] for r in rows] == list(names) and all(r["images"] == 8 and r["blockiness"] > 0 for r in rows)
    for row, changed in ablate.ROWS.items():
        folder = tmp_path / "runs" / f"{row}-0"
        kept = json.loads((folder / "config.json").read_text())
        assert all(kept["train"][k] == v for k, v in changed.items()) and (folder / "samples.png").exists()
    assert (tmp_path / "data" / "table1.png").exists()


def test_tables_name_known_rows():
    assert {row for rows in ablate.TABLES.values() for row in rows} == set(ablate.ROWS)


def test_resumes(photos, tmp_path, monkeypatch):
    measured, command = ablate.measured, small(photos, tmp_path, "dit", "deco")
    def fails(row, *rest):
        if row == "deco": raise KeyboardInterrupt("stopped")
        return measured(row, *rest)
    monkeypatch.setattr(ablate, "measured", fails)
    assert run(ablate, *command) == "stopped"
    done = tmp_path / "runs" / "dit-0" / "results.json"
    before, trained = done.stat().st_mtime_ns, []
    monkeypatch.setattr(ablate, "measured", measured)
    train = ablate.train
    monkeypatch.setattr(ablate, "train", lambda cfg: (trained.append(Path(cfg.out).name), train(cfg)))
    assert run(ablate, *command) == ""
    assert trained == ["deco-0"] and done.stat().st_mtime_ns == before
    assert run(ablate, *command) == "" and trained == ["deco-0"]                                # nothing is left to do
    assert "--out" in run(ablate, *command, "--lr", "1e-4")                                    # another setting is another run


def test_two_processes_share(photos, tmp_path, capsys):
    "A run that another process has claimed is left to it."
    command = small(photos, tmp_path, "dit", "deco")
    (tmp_path / "runs" / "dit-0").mkdir(parents=True)
    with open(tmp_path / "runs" / "dit-0" / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert run(ablate, *command) == ""
    rows = ablate.read_tidy(tmp_path / "data" / "table1.csv")
    assert [r["row"] for r in rows] == ["deco"]


def test_a_table_keeps_what_it_had(photos, tmp_path):
    "Seeds can be added later, on another machine too: observations of other runs stay in the file."
    command = small(photos, tmp_path, "dit")
    assert run(ablate, *command) == ""
    assert run(ablate, *command, "--seeds", "1,", "--out", tmp_path / "elsewhere") == ""
    rows = ablate.read_tidy(tmp_path / "data" / "table1.csv")
    assert [(r["row"], r["seed"]) for r in rows] == [("dit", 0), ("dit", 1)]
    assert rows[0] == ablate.collect("table1", tmp_path / "runs", tmp_path / "none.csv")[0] | {k: v for k, v in rows[0].items() if isinstance(v, float)}


def test_bad_input(photos, tmp_path):
    command = small(photos, tmp_path, "dit")
    assert "--seeds" in run(ablate, *command, "--seeds", "0")
    assert "--checkpoints" in run(ablate, *command, "--checkpoints", "3")
    assert "no weights" in run(ablate, *command, "--extractor-weights", tmp_path / "none.safetensors")
    assert not (tmp_path / "runs" / "dit-0" / "model.safetensors").exists()                   # it was said before the training
    assert "not in table1" in run(ablate, *small(photos, tmp_path, "dit-64"))
    assert "--sedes" in run(ablate, *command, "--sedes", "3")


def test_summary(tmp_path):
    rows = [dict(row=name, seed=s, images=n, parameters=5, **dict.fromkeys(ablate.METRICS, value * n))
            for name, values in (("a", (1.0, 3.0)), ("b", (2.0, 3.0))) for s, value in enumerate(values) for n in (1, 2)]
    ablate.write_tidy(tmp_path / "t.csv", rows)
    assert len(list(csv.reader(open(tmp_path / "t.csv")))) == 9 and ablate.read_tidy(tmp_path / "t.csv") == rows
    a, b = ablate.summary(rows)
    assert a["fid"] == (4.0, statistics.stdev([2, 6])) and b["seeds"] == 2
    assert ablate.ratios(rows, "b", "a") == [2.0, 1.0] == ablate.ratios(rows, "b", "a", images=1)


def test_blockiness():
    "A ramp is 1 whatever the patch; jumps of 3 at the borders of a ramp of slope 1 make (1 + 3) / 1."
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    assert ablate.blockiness(ramp + ramp.mT, 8) == pytest.approx(1)
    jumps = ramp + 3 * (ramp // 8)
    assert ablate.blockiness(jumps + jumps.mT, 8) == pytest.approx(4)
    assert abs(ablate.blockiness(torch.randn(64, 3, 32, 32), 8) - 1) < 0.02
    with pytest.raises(ValueError, match="border"): ablate.blockiness(ramp, 32)
