"""Do to a run what people, disks and schedulers do to it, and see whether the same command mends it.

    python tools/faults.py                      every case, each on its own copy of a tiny run (minutes)
    python tools/faults.py --only lost          those whose name has this word

A case is held if the run ends as one that nobody disturbed, file by file, or is refused in one line that says
why. tests/test_faults.py runs the same cases; kills of a real process are those of tools/kill.py.
"""
import argparse
import contextlib
import errno
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from deco import checkpoint
from deco import train as training
from deco.core import run_command, write_text

FLAGS = ["--smoke", "--steps", "1", "--ema-decay", "0.995", "0.9", "--keep", "9"]
LOST = ("model.safetensors", "model-0.9.safetensors", "samples.png", "loss.png", "config.json",
        "grids/000000064.png")


class Killed(BaseException): "What ends a run at once: nothing catches it, as nothing catches a SIGKILL."


class Place:
    "A folder with data and a copy of a run, finished at 64 images or stopped at 32, and how it is trained."
    def __init__(self, base: Path, kind: str = "done"):
        here = base.parent / "here"                                      # the same for all: runs know it
        shutil.rmtree(here, ignore_errors=True)
        self.base, self.run, self.data = base, here / "R", here / "photos"
        if kind: shutil.copytree(base / kind, self.run)
        shutil.copytree(base / "photos", self.data)

    def train(self, *flags, run: Path | None = None) -> tuple[int, str, str]:
        "The command, in this process: its exit code, what it prints, and its warnings and error."
        argv = [*FLAGS, "--data", str(self.data), "--data-root", str(self.base / "index"),
                "--out", str(run or self.run), *map(str, flags)]
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: run_command(lambda: training.main(argv))
            except SystemExit as e: code = e.code
        if isinstance(code, str): print(code, file=err)
        return int(code != 0), out.getvalue(), err.getvalue()

    def newest(self) -> Path: return checkpoint.checkpoints(self.run)[-1]

    def same(self, log: bool = True, settings: bool = True) -> None:
        "Assert that the run is the one that nobody has disturbed."
        done = self.base / "done"
        for name in LOST[:2]:
            a, b = load_file(self.run / name), load_file(done / name)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
        for name in ("samples.png", "grids/000000032.png", "grids/000000064.png"):
            assert (self.run / name).read_bytes() == (done / name).read_bytes(), name
        Image.open(self.run / "loss.png").load()
        a, b = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (self.run, done))
        assert not settings or a == b, "config.json"
        a, b = ([row | dict(speed=0) for row in checkpoint.read_log(f / "log.jsonl")]
                for f in (self.run, done))
        assert not log or a == b, "log.jsonl"
        left = [*self.run.rglob("*.tmp"), *self.run.glob("checkpoints/writing")]
        assert not left, left

    def mended(self, *flags, **parts) -> str:
        "Assert that the same command makes the run whole; its warnings."
        code, out, err = self.train(*flags)
        assert code == 0, err
        made = [line.strip() for line in out.split("made:")[1].split("next:")[0].splitlines() if line.strip()]
        assert made and all(Path(name).exists() for name in made), made
        self.same(**parts)
        return err

    def refused(self, *words, flags=(), run: Path | None = None) -> None:
        "Assert that the command ends in one line with these words."
        code, _, err = self.train(*flags, run=run)
        errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert code == 1 and len(errors) == 1 and errors[0].startswith("error: "), err
        assert all(word in errors[0] for word in words), errors[0]


def make_base(base: Path) -> None:
    "Data of two classes, a finished run, the same stopped at 32 of its 64 images, and one of another seed."
    for name, color in (("blue", (20, 40, 200)), ("red", (200, 30, 20))):
        (base / "photos" / name).mkdir(parents=True)
        for i in range(8):
            lighter = tuple(min(255, v + 5 * i) for v in color)
            Image.new("RGB", (24 + i, 20), lighter).save(base / "photos" / name / f"{i}.png")
    for name, flags in (("other", ("--seed", 1)), ("done", ()), ("half", ())):
        place = Place(base, "")
        with stop_at("replace", 11 if name == "half" else 0):            # the state.json of image 64
            with contextlib.suppress(Killed): assert place.train(*flags)[0] == 0
        shutil.copytree(place.run, base / name)
    assert [p.name for p in checkpoint.checkpoints(base / "half")] == ["000000000032"]


@contextlib.contextmanager
def stop_at(function: str, call: int, error: BaseException | None = None):
    "Within it the so-many-th call of os.replace or os.fsync (from 1) raises, by default as a kill."
    real, calls = getattr(os, function), []
    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call: raise error or Killed
        return real(*args, **kwargs)
    with mock.patch.object(os, function, counted): yield calls


CASES = {}                                      # by name: (kind of run, function of a Place)

def case(name: str, kind: str = "done"):
    def add(f): CASES[name] = kind, f
    return add


# --- stopped at every rename of the second half, on a full disk at every write of it

def killed(k):
    def go(place):
        with stop_at("replace", k), contextlib.suppress(Killed): place.train()
        place.mended()
    return go

def full(k):
    def go(place):
        with stop_at("fsync", k, OSError(errno.ENOSPC, "No space left on device")):
            code, _, err = place.train()
        assert code == 1 and "make room" in err and len(err.splitlines()) == 1, err
        place.mended()
    return go

for k in range(1, 10): case(f"killed at write {k}", "half")(killed(k))
for k in range(1, 8): case(f"full disk at write {k}", "half")(full(k))

@case("no errors but that of the disk", "half")
def _(place):
    faults = {errno.EISDIR: "in its way", errno.EROFS: "Read-only", errno.EIO: "Input/output"}
    for number, word in faults.items():
        with stop_at("replace", 1, OSError(number, os.strerror(number))):
            code, _, err = place.train()
        assert code == 1 and word in err and "make room" not in err, err
    place.mended()


# --- files lost, edited or taken from elsewhere

def lost(*names):
    def go(place):
        for name in names: (place.run / name).unlink()
        place.mended()
    return go

for name in LOST: case(f"lost: {name}")(lost(name))
case("lost: all")(lost(*LOST))

@case("lost: log.jsonl")
def _(place):
    (place.run / "log.jsonl").unlink()
    place.mended(log=False)

@case("lost: the config.json of a run on its way", "half")
def _(place):
    for text in (None, "", "[]", "null", "{", '{"train": 3}'):
        with contextlib.suppress(FileNotFoundError): (place.run / "config.json").unlink()
        if text is not None: write_text(place.run / "config.json", text)
        place.refused("--seed 0 (now 1)", flags=("--seed", 1))
    place.mended()

@case("older: model.safetensors")
def _(place):
    shutil.copy(place.base / "half" / "model.safetensors", place.run)
    place.mended()

@case("older: samples.png")
def _(place):
    shutil.copy(place.run / "grids" / "000000032.png", place.run / "samples.png")
    place.mended()

@case("older: config.json")
def _(place):
    shutil.copy(place.base / "half" / "config.json", place.run)
    place.mended()

@case("half a model.safetensors")
def _(place):
    path = place.run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:999])
    place.mended()

@case("leftovers of kills")
def _(place):
    for name in ("model.safetensors.12.tmp", "grids/000000064.png.12.tmp"): (place.run / name).touch()
    (place.run / "checkpoints" / "writing").mkdir()
    (place.run / "mine.tmp").write_text("of somebody else", "utf-8")
    code, _, err = place.train()
    assert code == 0 and not err and [p.name for p in place.run.rglob("*.tmp")] == ["mine.tmp"]

@case("another run's config.json")
def _(place):
    shutil.copy(place.base / "other" / "config.json", place.run)
    place.refused("--seed 1 (now 0)")


# --- checkpoints that are not as they were written, or of another run: the one before is used

def edited(**changes):
    def go(place):
        path = place.newest() / "state.json"
        state = json.loads(path.read_text("utf-8"))
        if changes.pop("no_checksum", False): del state["checksum"]
        write_text(path, json.dumps(state | changes))
        assert "000000000064" in place.mended()
        assert len(list(place.run.glob("checkpoints/*.damaged-*"))) == 1
    return go

EDITS = dict(seen=[32, 65, -64, 10**9, "64", None, 64.0, True], step=[10**12, 5, -1, None, "4"],
             bad=[-1, 3, None], files=[{}, None, []], config=[{}, None, "x"])
for name, values in EDITS.items():
    for value in values: case(f"edited: {name} {value!r}")(edited(**{name: value}))
for name, value in (("seen", 32), ("step", 10**12), ("step", 5), ("files", {}), ("bad", -1)):
    case(f"edited, no checksum: {name} {value!r}")(edited(no_checksum=True, **{name: value}))

def spoilt(name):
    def go(place):
        path, other = place.newest(), place.base / "other" / "checkpoints" / "000000000064"
        part = next(path.glob("*.safetensors"))
        if name == "empty": [p.unlink() for p in path.iterdir()]
        if name == "no state.json": (path / "state.json").unlink()
        if name == "empty state.json": (path / "state.json").write_text("", "utf-8")
        if name == "no weights": part.unlink()
        if name == "cut": part.write_bytes(part.read_bytes()[:500])
        if name in ("of another seed", "the one before"):
            shutil.rmtree(path)
            source = other if name == "of another seed" else checkpoint.checkpoints(place.run)[-1]
            shutil.copytree(source, path)
        if name == "state of another seed": shutil.copy(other / "state.json", path)
        if name == "weights of another seed": shutil.copy(next(other.glob("*.safetensors")), path / part.name)
        if name == "not finite":
            tensors = load_file(part)
            tensors["exp_avg.model.head.linear.bias"][0] = float("inf")
            save_file(tensors, part, dict(format="pt"))
            state = json.loads((path / "state.json").read_text("utf-8"))
            state["files"] = checkpoint._checksums(path)
            write_text(path / "state.json", json.dumps(state | dict(checksum=checkpoint._state_sum(state))))
        assert "000000000064" in place.mended()
    return go

for name in ("empty", "no state.json", "empty state.json", "no weights", "cut", "of another seed",
             "the one before", "state of another seed", "weights of another seed", "not finite"):
    case(f"checkpoint: {name}")(spoilt(name))

@case("checkpoint: files of such names")
def _(place):
    for name in ("000000000999", "²", "-00000000064"): (place.run / "checkpoints" / name).touch()
    place.mended()

@case("checkpoint: what is set aside does not pile up")
def _(place):
    for _ in range(4):
        (place.newest() / "state.json").write_text("{", "utf-8")
        place.mended()
    assert len(list(place.run.glob("checkpoints/*.damaged-*"))) == 2


# --- settings, data and lengths

@case("another seed, config.json gone")
def _(place):
    (place.run / "config.json").unlink()
    place.refused("--seed 0 (now 1)", flags=("--seed", 1))

@case("another rate before the first checkpoint")
def _(place):
    shutil.rmtree(place.run)
    with stop_at("fsync", 3), contextlib.suppress(Killed): place.train()           # in the first checkpoint
    assert not checkpoint.checkpoints(place.run) and checkpoint.read_log(place.run / "log.jsonl")
    place.refused("--lr 0.004 (now 0.1)", flags=("--lr", 0.1))
    place.mended()

@case("another rate before the first step")
def _(place):
    shutil.rmtree(place.run)
    with stop_at("replace", 2), contextlib.suppress(Killed): place.train("--lr", 0.1)
    assert (place.run / "config.json").exists()
    place.mended()

@case("a class renamed", "half")
def _(place):
    (place.data / "blue").rename(place.data / "zebra")
    place.refused("'blue'", "'zebra'")
    (place.run / "config.json").unlink()
    place.refused("'blue'", "'zebra'")
    (place.data / "zebra").rename(place.data / "blue")
    place.mended()

@case("a class more, a class less")
def _(place):
    shutil.copytree(place.data / "blue", place.data / "green")
    place.refused("3 classes", "'green'")
    for name in ("green", "blue"): shutil.rmtree(place.data / name)
    place.refused("1 classes", "'blue'")

@case("an image moved to another class")
def _(place):
    (place.data / "blue" / "0.png").rename(place.data / "red" / "x.png")
    code, _, err = place.train()
    assert code == 0 and "blue: 7 (before: 8)" in err and len(err.splitlines()) == 1, err

@case("longer")
def _(place):
    code, out, err = place.train("--images", 96)
    assert code == 0 and err.startswith("warning: its 64 images were trained for --images 64"), err
    assert len(err.splitlines()) == 1 and "--out" in err and "resuming after 64" in out
    assert place.train("--images", 96)[2] == ""                                     # it is one of 96 now

@case("longer, at a rate that does not fall")
def _(place):
    shutil.rmtree(place.run)
    for images in (32, 64): assert place.train("--images", images, "--warmup", 0, "--decay", 0)[2] == ""

@case("shorter")
def _(place):
    code, out, err = place.train("--images", 32)
    assert code == 0 and "has seen 64 images, more than --images 32" in err and len(err.splitlines()) == 1
    place.same()

@case("shorter, just where it was stopped", "half")
def _(place):
    for name in ("samples.png", "grids/000000032.png"): (place.run / name).unlink()
    code, out, err = place.train("--images", 32)
    assert code == 0 and err == "", err                     # so far the rates are those of a run of 32 images
    assert (place.run / "samples.png").exists() and "samples.png" in out
    place.mended()

@case("weights that are not finite are not saved", "half")
def _(place):
    real = training.ema_update
    def spoil(ema, model, decay, step):
        real(ema, model, decay, step)
        if step == 3: next(iter(ema.values()))[0] = float("nan")
    with mock.patch.object(training, "ema_update", spoil): place.refused("not finite", "--lr", "000000000032")
    assert place.newest().name == "000000000032"
    place.mended()

@case("--init from weights that are not finite")
def _(place):
    tensors = load_file(place.run / "model.safetensors")
    tensors["head.linear.bias"][0] = float("nan")
    save_file(tensors, place.run / "model.safetensors")
    place.refused("not finite", "--init", run=place.run.parent / "new", flags=("--init", place.run))


# --- the log

LINES = ("[1, 2]", "3", "null", "{}", '"text"', '{"images": "16"}', '{"images": 16, "mse": "1.0"}', "true",
         '{"images": 16, "speed": {"seconds": "x"}}', '{"images": 16, "mse": [[1]]}', '{"images": 1e9}',
         '{"images": 16, "mse": [1]}', "[" * 99999,
         '{"images": 16, "mse": 1' + "0" * 400 + "}", '{"images": 16, "speed": 3}', '{"images": null}')
for line in LINES:
    @case(f"log: {line[:40]}", "half")
    def _(place, line=line):
        path = place.run / "log.jsonl"
        rows = path.read_text("utf-8").splitlines()
        write_text(path, "\n".join([rows[0], line, *rows[1:]]) + "\n")
        err = place.mended(log=not checkpoint._is_row(json.loads(line)) if line[:2] != "[[" else True)
        assert len(err.splitlines()) <= 1 and "log.jsonl" in err + "log.jsonl" * (not err)

@case("log: a last row without its speed, and one cut short", "half")
def _(place):
    path = place.run / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows[-1].pop("speed")
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows) + '{"images": 48, "ms')
    assert place.mended() == ""

@case("log: bytes that are no text", "half")
def _(place):
    with open(place.run / "log.jsonl", "ab") as f: f.write(b"\xff\xfe\x00\n{}\n")
    assert "log.jsonl" in place.mended()


# --- places

@case("an empty --out or --data")
def _(place):
    for name in ("--out", "--data", "--data-root"):
        for value in ("", " "): place.refused(name, "empty", flags=(name, value))

@case("things in the way")
def _(place):
    (place.run.parent / "file").write_text("mine", "utf-8")
    place.refused("file", "in its way", run=place.run.parent / "file")
    place.refused("file", run=place.run.parent / "file" / "R")
    shutil.rmtree(place.run / "checkpoints")
    (place.run / "checkpoints").write_text("mine", "utf-8")
    place.refused("checkpoints", "in its way")

@case("a path with spaces")
def _(place):
    folder = place.run.parent / "my run's"
    code, out, _ = place.train(run=folder)
    assert code == 0 and f"deco.sample '{place.run.parent}/my run'\"'\"'s' --classes 0,1 " in out, out


def results(names: list[str]):
    "Try cases, each on its own copy of a run; give (name, what went wrong or '')."
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make_base(base)
        for name in names:
            kind, check = CASES[name]
            problem = ""
            try: check(Place(base, kind))
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt): raise
                last = traceback.extract_tb(e.__traceback__)[-1]
                problem = f"line {last.lineno}: {type(e).__name__}: {str(e)[:500]}"
            yield name, problem


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", help="cases whose name has this word")
    args = parser.parse_args()
    tried = held = 0
    for name, problem in results([name for name in CASES if args.only in name]):
        tried += 1
        held += not problem
        if problem: print(f"NOT HELD: {name}: {problem}", flush=True)
    print(f"tried {tried}, held {held}")
    sys.exit(held < tried)


if __name__ == "__main__": main()
