"""Read 100,000 generated pictures in the layouts that people have; torchvision and webdataset beside us.

    python tools/reading.py --folder /tmp/layouts --out reading.json         makes about 2 GB, removes nothing

Each reader has a process of its own, twice: the first call lists, the second finds what was kept. Told are
the seconds from opening to the first batch, the most memory of the process, and pictures a second after that.
"""
import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
import numpy as np
from PIL import Image

CLASSES = 100
BATCH = 64


def encoded(k: int, side: int) -> bytes:
    "A JPEG of this side with a pattern of its own."
    coarse = np.random.default_rng(k).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def add(tar, name: str, content: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def make(folder: Path, n: int, side: int):
    "Write the same n pictures as an image folder, as parquet, as img2dataset does, and as one tar per class."
    if (folder / "done").exists(): return
    import pyarrow
    import pyarrow.parquet
    pictures = [encoded(k, side) for k in range(1000)]
    numbers = range(n)
    for k in numbers:                                               # class by class, as folders are listed
        place = folder / "folder" / f"n{k * CLASSES // n:08}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{k:06}.jpg").write_bytes(pictures[k % 1000])
    (folder / "parquet" / "data").mkdir(parents=True)
    parts = np.array_split(np.arange(n), 10)
    for p, part in enumerate(parts):
        rows = []
        for k in part.tolist():
            rows.append(dict(image=dict(bytes=pictures[k % 1000], path=f"{k}.jpg"), label=k * CLASSES // n))
        name = f"train-{p:05}-of-00010.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "parquet" / "data" / name)
    (folder / "img2dataset").mkdir()
    for p, part in enumerate(parts):
        with tarfile.open(folder / "img2dataset" / f"{p:05}.tar", "w") as tar:
            for k in part:
                about = dict(caption=f"picture {k}", label=int(k) * CLASSES // n, url="x", status="success")
                add(tar, f"{k:09}.jpg", pictures[k % 1000])
                add(tar, f"{k:09}.json", json.dumps(about).encode())
                add(tar, f"{k:09}.txt", f"picture {k}".encode())
    (folder / "tars").mkdir()
    for c, part in enumerate(np.array_split(np.arange(n), CLASSES)):
        with tarfile.open(folder / "tars" / f"n{c:08}.tar", "w") as tar:
            for k in part: add(tar, f"n{c:08}_{k}.JPEG", pictures[k % 1000])
    (folder / "done").touch()


def ours(folder, layout, size, workers):
    from deco.datasets import open_data
    from deco.files import batches
    data = open_data(folder / layout, size, folder / "cache")
    assert len(data.classes) == CLASSES, data.classes
    for _, pixels, *_ in batches(data, 0, 0, 10**9, BATCH, workers=workers): yield len(pixels)


def transform(size):
    from torchvision import transforms
    shrink = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([shrink, transforms.CenterCrop(size), transforms.PILToTensor()])


def image_folder(folder, layout, size, workers):
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    data = ImageFolder(folder / layout, transform(size))
    while True:
        for pixels, _ in DataLoader(data, BATCH, shuffle=True, num_workers=workers): yield len(pixels)


def webdataset(folder, layout, size, workers):
    import webdataset
    from torch.utils.data import DataLoader
    urls = sorted(map(str, (folder / layout).glob("*.tar")))
    change = transform(size)
    def pictures(sample): return change(sample["jpg"]), sample["json"]["label"]
    data = webdataset.WebDataset(urls, shardshuffle=10).shuffle(1000).decode("pil").map(pictures)
    while True:
        for pixels, _ in DataLoader(data, BATCH, num_workers=workers): yield len(pixels)


READERS = {"deco": ours, "torchvision": image_folder, "webdataset": webdataset}
WAYS = (("deco", "folder"), ("torchvision", "folder"), ("deco", "img2dataset"), ("webdataset", "img2dataset"),
        ("deco", "parquet"), ("deco", "tars"))


def measure(reader: str, layout: str, folder: Path, size: int, workers: int, read: int) -> dict:
    "What one process needs to read so many pictures."
    import torch
    import torchvision.datasets  # noqa: F401   so that no reader pays for the imports
    torch.set_num_threads(1)
    start = time.perf_counter()
    stream = READERS[reader](folder, layout, size, workers)
    count = -next(stream)
    first = time.perf_counter() - start
    start = time.perf_counter()
    while count < read: count += next(stream)
    rate = count / (time.perf_counter() - start)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    memory = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024
    return dict(first_batch_s=round(first, 2), images_per_second=round(rate), peak_memory_mb=memory)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--read", type=int, default=10_000)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = args.folder, args.size, args.workers, args.read
    if args.one:
        print(json.dumps(measure(*args.one, *settings)), flush=True)
        os._exit(0)                                                 # without waiting for workers
    make(args.folder, args.images, args.side)
    rows = []
    for call in ("first", "second"):
        for reader, layout in WAYS:
            run = [sys.executable, __file__, *sys.argv[1:], "--one", reader, layout]
            done = subprocess.run(run, capture_output=True, encoding="utf-8")
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            result = json.loads(lines[-1]) if lines else dict(error=done.stderr.strip().splitlines()[-1:])
            rows.append(dict(reader=reader, layout=layout, call=call, **result))
            print(rows[-1], flush=True)
    if not args.out: return
    args.out.write_text(json.dumps(dict(images=args.images, rows=rows), indent=1), encoding="utf-8")


if __name__ == "__main__": main()
