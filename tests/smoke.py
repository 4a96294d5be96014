"""Every preset, shrunk to four tiny steps: train (which draws and saves), resume, sample, evaluate.

Alone, or under torchrun. DATA is "openmoji", or what else --data takes:

    python tests/smoke.py FOLDER DATA [PRESET ...]
    torchrun --standalone --nproc-per-node=2 tests/smoke.py FOLDER DATA [PRESET ...]
"""
import sys
from pathlib import Path
from deco import checkpoint, config, core, evaluate, sample, train

CLASSIFIER = Path(__file__).parent.parent / "nbs/results/metrics_classifier/model.safetensors"


def smoke(preset: str, folder: Path, data: str, parallel: str) -> None:
    "All that a user does with a run, within its first four steps."
    out = folder / preset
    flags = ["--preset", preset, "--smoke", "--parallel", parallel, "--data", data,
             "--data-root", str(folder / "data"), "--out", str(out)]
    train.main([*flags, "--images", "32"])
    train.main([*flags, "--images", "64"])
    drawn = ["--num-images", "6", "--steps", "2", "--device", "cpu"]
    sample.main([str(out), *drawn, "--out", str(folder / f"{preset}-samples")])
    evaluate.main([str(out), *drawn, "--extractor", "classifier", "--extractor-weights", str(CLASSIFIER)])
    core.on_rank0(lambda: complete(out, folder / f"{preset}-samples"))   # the first process writes the report


def complete(out: Path, samples: Path) -> None:
    "All that is there afterwards."
    assert [row["images"] for row in checkpoint.read_log(out / "log.jsonl")] == [16, 32, 48, 64], out
    assert [p.name for p in checkpoint.checkpoints(out)] == ["000000000032", "000000000064"], out
    assert (out / "evaluation" / "report.md").exists(), out
    assert len(list(samples.glob("*.png"))) == 6, out


def main(argv: list[str]) -> None:
    folder, data, *presets = argv
    with core.process_group("cpu"):         # one group for all: torchrun's store is not made for several
        for i, preset in enumerate(presets or config.PRESETS):
            smoke(preset, Path(folder), data, ("ddp", "fsdp")[i % 2])


if __name__ == "__main__": main(sys.argv[1:])
