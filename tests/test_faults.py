"What befalls a run (tools/faults.py tries more of each kind), other machines, and one process at a time."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
import pytest
import faults
from conftest import run
from deco import checkpoint, core, STOP_SIGNALS
from deco import train as training
from deco.core import claim, read_json, write_atomic

ROOT = Path(__file__).parent.parent

# of each kind that can fail alone
CASES = [*(f"killed at write {k}" for k in (3, 5, 7, 9)), "full disk at write 4",
         "no errors but that of the disk", "lost: all", "lost: model-0.9.safetensors",
         "lost: the config.json of a run on its way",
         "older: model.safetensors", "older: samples.png", "leftovers of kills", "edited: seen 32",
         "edited, no checksum: seen 32", "edited, no checksum: step 5", "edited, no checksum: files {}",
         "checkpoint: of another seed", "checkpoint: not finite", "checkpoint: files of such names",
         "checkpoint: what is set aside does not pile up", "another rate before the first checkpoint",
         "a class renamed", "an image moved to another class", "longer", "shorter",
         "weights that are not finite are not saved", "--init from weights that are not finite",
         'log: {"images": 16, "mse": "1.0"}', "log: a last row without its speed, and one cut short",
         "an empty --out or --data", "things in the way", "a path with spaces"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults") / "base"
    faults.make_base(base)
    return base


@pytest.mark.parametrize("name", CASES)
def test_run(name, base):
    kind, check = faults.CASES[name]
    check(faults.Place(base, kind))


def test_no_line_of_a_log_stops_a_run(tmp_path, capsys):
    first, last = '{"images": 16, "mse": 1.0, "mse_by_time": [0.5, null]}', '{"images": 32, "mse": NaN}'
    rows = [first, *faults.LINES, last, '{"im']
    (tmp_path / "log.jsonl").write_text("\n".join(rows), "utf-8")
    kept = checkpoint.read_log(tmp_path / "log.jsonl")
    assert [row["images"] for row in kept] == [16, 1e9, 32]
    assert len(capsys.readouterr().err.splitlines()) == 1
    checkpoint.plot_log(tmp_path / "loss.png", kept)


# --- signals

@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_saves(number, base, monkeypatch):
    place, real = faults.Place(base, ""), training.ema_update
    def interrupted(*args):
        real(*args)
        if args[-1] == 0: signal.raise_signal(number)
    monkeypatch.setattr(training, "ema_update", interrupted)
    before = signal.getsignal(number)
    code, _, err = place.train()
    assert (code, err) == (1, "stopped and saved after 32 images; the same command goes on from there\n")
    assert signal.getsignal(number) == before
    assert place.newest().name == "000000000032"


def test_signal_code(capsys):
    for number, text in ((signal.SIGINT, "stopped"), (signal.SIGTERM, "stopped by SIGTERM")):
        with pytest.raises(SystemExit) as e: core.run_command(lambda: signal.raise_signal(number))
        assert e.value.code == 128 + number and capsys.readouterr().err == text + "\n"


def test_ignored_signals_stay_so():
    "What nohup, or a shell's &, has told a process not to hear."
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try: core.run_command(lambda: signal.raise_signal(signal.SIGTERM))
    finally: signal.signal(signal.SIGTERM, before)


def test_early_interrupt():
    "Ctrl-C while torch is imported: one line, not the traceback of an import."
    command = [sys.executable, "-X", "importtime", "-m", "deco.train", "--dry-run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as p:
        for line in p.stderr:
            if "torch" in line: break
        p.send_signal(signal.SIGINT)
        said = [line for line in p.stderr if not line.startswith("import time:")]
    assert said == ["stopped\n"] and p.returncode == 130


def test_launcher_killed(monkeypatch):
    "A process whose torchrun is gone is asked to stop, and ended if it doesn't."
    noted, ended = [], []
    monkeypatch.setattr(core, "PARENT", -1)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with core.on_signals(lambda number, _: noted.append(number)):
        core.watch_launcher.__wrapped__(grace=0.1)
        deadline = time.time() + 10
        while not (noted and ended) and time.time() < deadline: time.sleep(0.05)
    assert noted == [signal.SIGTERM] and ended == [1]


def test_reader_killed():
    "Torch raises it wherever the main process is."
    def reads(): raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    error = run(SimpleNamespace(main=lambda _: reads()))
    assert error.startswith("error: a process that reads images has died") and "--workers" in error


# --- one at a time

def test_two_at_once(base, monkeypatch):
    place, real = faults.Place(base), checkpoint.claim
    monkeypatch.setattr(checkpoint, "claim", lambda folder, patience: real(folder, patience=0.1))
    with claim(place.run) as holder:
        assert holder == ""
        place.refused(f"process {os.getpid()} on ", "since", "--out")
    place.mended()


def test_no_locks_here(tmp_path, monkeypatch, capsys):
    "A file system without locks: a warning, and the work goes on."
    def refuse(f): raise OSError(38, "Function not implemented")
    monkeypatch.setattr(core, "lock_file", refuse)
    with claim(tmp_path) as holder: assert holder == ""
    assert "second process" in capsys.readouterr().err


# --- what a write says

def test_full_disk_says_so(tmp_path):
    from safetensors import SafetensorError
    def write(error):
        def fails(path): raise error
        with pytest.raises(OSError) as e: write_atomic(tmp_path / "f", fails)
        return str(e.value)
    full = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert "make room" in write(SafetensorError(full))
    assert "make room" not in write(SafetensorError(full.replace("28", "5")))
    assert "make room" not in write(OSError("cannot identify image file 'x.png'"))
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="in its way"): write_atomic(tmp_path / "d", Path.touch)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="in its way"): write_atomic(tmp_path / "file" / "f", Path.touch)


# --- other machines

WINDOWS = """
import os, pathlib, signal, sys
import matplotlib.figure, multiprocessing, torch.distributed.checkpoint              # they know such machines
for name in ("fcntl", "resource", "pwd", "grp"): sys.modules[name] = None
for name in ("fork", "register_at_fork", "sched_getaffinity", "geteuid", "killpg"): delattr(os, name)
for name in "SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGXCPU SIGKILL SIGALRM".split(): delattr(signal, name)
import types
sys.modules["msvcrt"] = types.SimpleNamespace(locking=lambda *args: None, LK_NBLCK=2)
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: not str(self).startswith("/proc") and exists(self)
import deco.train, deco.ablate, deco.demo, deco.sample, deco.evaluate
from deco.core import run_command
data, out, weights = sys.argv[1:]
run = out + "/R"
flags = ["--smoke", "--data", data, "--data-root", out, "--steps", "1", "--out", run]
run_command(lambda: deco.train.main(flags))
flags = ["--extractor", "classifier", "--extractor-weights", weights, "--num-images", "16", "--steps", "1"]
run_command(lambda: deco.evaluate.main([run, *flags]))
run_command(lambda: deco.sample.main([run, "--num-images", "2", "--steps", "1", "--out", out + "/g.png"]))
"""

def test_elsewhere(base, tmp_path):
    "Without what only Linux has, in a locale without letters, with classes that need them: a run, measured."
    data = tmp_path / "data"
    faults.shutil.copytree(base / "photos", data)
    (data / "blue").rename(data / "猫")
    (data / "red").rename(data / "ключ")
    weights = ROOT / "nbs/results/metrics_classifier/model.safetensors"
    env = os.environ | dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", WINDOWS, data, tmp_path / "out", weights], env=env,
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    assert read_json(tmp_path / "out" / "R" / "evaluation" / "report.json")
    (tmp_path / "out" / "R" / "evaluation" / "report.md").read_text("utf-8")
    log = checkpoint.read_log(tmp_path / "out" / "R" / "log.jsonl")
    assert log and all(row["speed"]["memory_mb"] == 0 for row in log)


def test_wandb(base, tmp_path, monkeypatch):
    "Two folders of one name are two runs; after a restart no row is dropped for its step."
    started, logged = [], []
    fake = SimpleNamespace(init=lambda **settings: started.append(settings),
                           define_metric=lambda *names, **settings: None,
                           log=lambda row, **at: logged.append((row["images"], at)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for parent in ("a", "b"): (tmp_path / parent / "run").mkdir(parents=True)
    for parent in ("a", "b", "a"):
        checkpoint._to_wandb(training.Config(), tmp_path / parent / "run")(dict(images=16, speed={}))
    a, b, again = (settings["id"] for settings in started)
    assert a == again != b and logged == [(16, {})] * 3
