"""Kill a run with SIGKILL at random moments, start it again, and compare its end with an undisturbed run's.

    python tools/kill.py --kills 20                                    minutes on two cores
    python tools/kill.py --kills 20 --out nbs/results/train_kill.json     and keep the result

A run is tiny and saves every second step. Every other kill waits until it has begun to write a checkpoint.
Compared are all tensors, bit for bit, and the logs without their speeds; the undisturbed run saves at its end
alone. Each start is a process of its own, forked (where the system can) off one that has torch imported.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
import torch
from safetensors.torch import load_file
from deco.train import main as train

FLAGS = ["--smoke", "--data", "openmoji", "--optimizer", "adamw", "--sample-every", "320", "--keep", "2"]


def silent(argv: list[str]) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere): train(argv)


def start(out: Path, steps: int, save_every: int = 2):
    "Begin or go on with a run, in a process of its own."
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    argv = [*FLAGS, "--images", str(16 * steps), "--save-every", str(16 * save_every), "--out", str(out)]
    process = context.Process(target=silent, args=(argv,))
    process.start()
    return process


def finish(out: Path, steps: int, **settings) -> None:
    process = start(out, steps, **settings)
    process.join()
    assert process.exitcode == 0, f"the run ended with exit code {process.exitcode}"


def newest(out: Path) -> int:
    "Images of the newest checkpoint."
    return max((int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def end(out: Path) -> dict[str, torch.Tensor]:
    "All that the last checkpoint holds, and the averaged weights."
    tensors = dict(load_file(out / "model.safetensors"))
    checkpoint = out / "checkpoints" / f"{newest(out):012d}"
    for path in checkpoint.glob("*.safetensors"): tensors |= load_file(path)
    return tensors


def log(out: Path) -> list[dict]:
    "The rows of the run's log without what differs from run to run."
    rows = map(json.loads, (out / "log.jsonl").read_text("utf-8").splitlines())
    return [{k: v for k, v in row.items() if k != "speed"} for row in rows]


def same(a: Path, b: Path) -> bool:
    "Did two runs end alike?"
    x, y = end(a), end(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) and log(a) == log(b)


def killed_run(out: Path, kills: int, steps: int, seed: int) -> dict:
    "Kill a run so many times, each time at a random moment after its first checkpoint; then let it finish."
    random.seed(seed)
    writing = 0
    for kill in range(kills):
        before = newest(out)
        run = start(out, steps)
        while newest(out) == before and run.exitcode is None: time.sleep(0.01)          # it is on its way
        if kill % 2:
            while not (out / "checkpoints" / "writing").exists() and run.exitcode is None: time.sleep(0.0005)
        time.sleep(random.uniform(0, 0.02 if kill % 2 else 0.5))
        assert run.exitcode is None, "the run ended before it was killed: give it more steps"
        run.kill()
        run.join()
        writing += (out / "checkpoints" / "writing").exists()
    finish(out, steps)
    return dict(kills=kills, steps=steps, while_writing=writing)


def main(argv: list[str] | None = None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40, help="of the run, for each kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", default="", help="a JSON file for the result")
    args = parser.parse_args(argv)
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        killed, undisturbed = Path(folder) / "killed", Path(folder) / "undisturbed"
        result = killed_run(killed, args.kills, args.steps * args.kills, args.seed)
        finish(undisturbed, result["steps"], save_every=result["steps"])
        result |= dict(tensors=len(end(killed)), identical=same(killed, undisturbed))
    result |= dict(seed=args.seed, seconds=round(time.time() - begin))
    print(json.dumps(result))
    if args.out: Path(args.out).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    sys.exit(not result["identical"])


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["deco.train"])
    main()
