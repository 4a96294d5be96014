"""Lay siege to deco: nasty numbers, edited and broken files, and a page among enemies; count what holds.

    python tools/siege.py numbers files page runs      all of it: about a quarter of an hour on two cores
    python tools/siege.py files --seed 1 --share 0.1   a tenth of the cases, others for another seed

What holds is done, or refused by one line that names what is wrong: no traceback, and no more memory than
--memory GB (of Linux's address space). Other people's trees have other faults: add a group as a function that
yields (what was tried, what went wrong or "").
"""
import argparse
import contextlib
import copy
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock
import numpy as np
import torch
from safetensors.torch import save_file
import deco
from deco import ablate, demo, evaluate, geneval, metrics, plan, sample, scenes, train
from deco.core import check_finite, flag, run_command
from deco.official import load_official

Case = tuple[str, str]                              # what was tried; what went wrong, "" where it held
WORDS = ["nan", "inf", "-inf", "-1", "0", "0.5", "1e30", "1e39", "-1e39", "1" + 23 * "0", "9" * 5000, "", "x",
         "\x1b[31m", "x" * 100_000]
VALUES = [None, True, "", "x", "\x1b[31m<img>", "x" * 100_000, [], {}, ["x"], [1], [[]], {"x": 1}, -1, 0, 1,
          1.5, 16.0, 1e308, 10**23, 10**400, float("nan"), float("inf"), 10**6, 10**7, 10**12,
          5 * [5 * [5 * [0]]]]
DEEP = 100_000 * "[" + 100_000 * "]"


def judged(f: Callable, refused: bool = False, seconds: int = 60) -> str:
    """Say what goes wrong where f() is neither done nor refused in one line, "" for nothing.

    refused: it must be refused. A lack of memory is wrong: what asks for too much is to be refused.
    """
    def late(*args): raise TimeoutError("too slow")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said): run_command(f)
    except SystemExit as e:
        text = str(e.code)
        if e.code in (0, None): return ""
        if "out of memory" in text or "too slow" in text: return text
        return "" if "\n" not in text and len(text) < 4000 and text.isprintable() else "not one line"
    except Exception as e: return f"{type(e).__name__}: {str(e)[:100]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if "\x1b" in said.getvalue(): return "an escape code came through"
    return "accepted" if refused else ""


def some(cases: list, share: float, *seed) -> list:
    "Choose a share of cases, others for another seed."
    return [c for c in cases if random.Random(repr((seed, c[0]))).random() < share]


def make_run(folder: Path) -> Path:
    "Write a run of two classes, and one of prompts beside it, with weights that matter."
    for name, shape, info in (("run", dict(num_classes=2), dict(classes=["cat", "dog"], class_counts=[3, 4])),
                              ("words", dict(text_width=384, text_length=16, text_depth=1),
                               dict(text=dict(name="minilm", length=16), prompts=["a photo"]))):
        torch.manual_seed(0)
        model = deco.create("deco-tiny", **shape)
        for p in model.parameters():
            if not p.any(): torch.nn.init.normal_(p, std=0.02)
        more = dict(size=16, images_seen=64, train=dict(data="openmoji", data_root="data", sample_shift=1.0,
                                                        ema_decay=[0.995], guidance=3.0, steps=20))
        deco.save(folder / name, model, info | more)
    return folder / "run"


# --- numbers

def commands(run: Path, real: bool) -> list[tuple]:
    "List (name, settings, main, base): a cheap call of each command; real: what it says is also done."
    out, words = run.parent / "out", run.parent / "words"
    cheap = ["--steps", "1", "--num-images", "1", "--device", "cpu"]
    prompts = run.parent / "prompts.jsonl"
    prompts.write_text('{"tag": "x", "include": [], "prompt": "a photo"}\n', "utf-8")
    tiny = ["--model", "deco-tiny", "--size", "16", "--images", "16", "--batch-size", "8", "--steps", "1",
            "--data", "openmoji", "--device", "cpu"]
    dry = [] if real else ["--dry-run"]
    return [("sample", sample.Sampling, sample.main, [run, *cheap, "--out", out / "x.png"]),
            ("train", deco.config.Config, train.main, [*tiny, *dry, "--out", out / "train"]),
            ("plan", plan.Machine, plan.main, tiny), ("plan", deco.config.Config, plan.main, tiny),
            ("geneval", geneval.Export, geneval.main,
             [words, "--prompts", prompts, "--out", out / "g", "--steps", "1", "--device", "cpu",
              "--per-prompt", "1"]),
            ("scenes", scenes.Scoring, scenes.main,
             [words, "--steps", "1", "--per-task", "1", "--device", "cpu", "--out", out / "s"]),
            ("evaluate", evaluate.Evaluation, evaluate.main,
             [run, "--steps", "1", "--num-images", "4", "--out", out / "e", "--extractor", "nowhere"]),
            ("ablate", ablate.Ablation, ablate.main,
             ["table1", "--extractor", "nowhere", "--out", out / "a"]),
            ("demo", demo.Demo, demo.main, ["nowhere/at-all", "--device", "cpu"])]


def numbers(folder: Path, share: float, seed: int, real: bool = True) -> Iterator[Case]:
    "Give every setting of every command nasty values, and every argument of a model."
    run = make_run(folder)
    before = Path.cwd()
    os.chdir(folder)                                # where a nasty --out leads
    try: yield from _numbers(run, share, seed, real)
    finally: os.chdir(before)


def _numbers(run, share, seed, real):
    for name, kind, main, base in commands(run, real):
        for f in fields(kind):
            if isinstance(f.default, bool) or f.metadata["how"].get("positional"): continue
            cases = [(f"{name} {flag(f.name)} {word[:30]!r}", word) for word in WORDS]
            for what, word in some(cases, share, seed):
                argv = [str(a) for a in base] + [f"{flag(f.name)}={word}"]
                if f.metadata["how"].get("nargs") == 2: argv[-1:] = [flag(f.name), word, word]
                yield what, judged(lambda: main(argv))
    for size, names in (("deco-tiny", deco.model._ARGUMENTS), ("dit-tiny", ["field_width", "field_depth"])):
        for argument in names:
            cases = [(f"{size} {argument}={v!r:.30}", v) for v in VALUES]
            for what, v in some(cases, share, seed):
                with torch.device("meta"): yield what, judged(lambda: deco.create(size, **{argument: v}))
    for text in WORDS:
        for argument in deco.model._ARGUMENTS:
            if not some([(f"{argument} {text}",)], share, seed): continue
            argv = ["--dry-run", "--model", "deco-tiny", "--size", "16", "--model-args", f"{argument}={text}"]
            yield f"--model-args {argument}={text[:30]!r}", judged(lambda: train.main(argv))


# --- files

def places(value, path: tuple = ()) -> Iterator[tuple]:
    "Give the paths of all that a JSON value holds, of lists the first alone."
    if path: yield path
    parts = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list): parts = enumerate(value[:1])
    for key, part in parts: yield from places(part, (*path, key))


def edits(value: dict) -> list[tuple[str, str]]:
    "Give (what was done, text) of a JSON object with each part replaced by each nasty value, or left out."
    out = [("nothing", ""), ("deep", DEEP), ("deep inside", f'{{"size": {DEEP}}}'), ("a list", "[]")]
    for path in places(value):
        for new in [*VALUES, "left out"]:
            changed = copy.deepcopy(value)
            inner = changed
            for key in path[:-1]: inner = inner[key]
            if new == "left out": del inner[path[-1]]
            else: inner[path[-1]] = new
            out.append((f"{'.'.join(map(str, path))} = {new!r:.30}", json.dumps(changed)))
    return out


def damages(content: bytes, seed: int, n: int = 60) -> list[tuple[str, bytes]]:
    "Give (what was done, bytes) of a file cut short, or with a few bytes changed, most near its ends."
    rng, out = random.Random(seed), []
    ends = [*range(min(2048, len(content))), *range(max(0, len(content) - 2048), len(content))]
    for i in range(n):
        at = rng.choice(ends) if i % 3 else rng.randrange(len(content))
        out.append((f"cut at {at}", content[:at]))
        changed = bytearray(content)
        for k in range(rng.choice((1, 1, 4))): changed[min(len(content) - 1, at + k)] ^= rng.randrange(1, 256)
        out.append((f"changed at {at}", bytes(changed)))
    return out


def make_files(folder: Path, run: Path) -> dict[str, tuple]:
    "Write one of each file: by path, what reads it."
    extractor = metrics.load_extractor("efficientnet-lite0")
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (12, 3, 16, 16), dtype=np.uint8))
    stats = metrics.statistics(images, extractor)
    report = dict(metrics=dict(fid=3.5, recall=None), n=12, extractor="e 1", drawn_now=0,
                  reference=dict(name="data", n=12, fingerprint="f"), notes=["note"], command="python -m x",
                  settings=dict(run="r", seed=0, labels="data", classes=["cat", "dog"], size=16, num=12),
                  seconds={}, spectra=dict(samples=stats["spectrum"].tolist()))
    for name in ("report.json", "other.json"): (folder / name).write_text(json.dumps(report), "utf-8")
    np.savez(folder / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    moments = ("mu", "sigma", "mu_s", "sigma_s")
    small = {k: stats[k].numpy()[(slice(9),) * stats[k].ndim] for k in moments}
    np.savez(folder / "adm.npz", **small)
    texts = dict(count="12", extractor=extractor.label)
    tensors = {k: v.contiguous() for k, v in stats.items() if isinstance(v, torch.Tensor)}
    tensors |= {k: torch.from_numpy(v.copy()) for k, v in small.items()}
    tensors["features"] = stats["features"][:, :9].clone()
    save_file(tensors, folder / "stats.safetensors", texts)
    golden = Path(__file__).parent.parent / "tests/golden/lightning_tiny.ckpt"
    (folder / "model.ckpt").write_bytes(golden.read_bytes())
    (folder / "prompts.jsonl").write_text('{"tag": "x", "include": [], "prompt": "a photo"}', "utf-8")
    (folder / "samples.json").write_text(json.dumps(report["settings"]), "utf-8")
    out = folder / "grid.png"

    def draw():
        for cfg in (sample.Sampling(run=str(run), num_images=1, steps=1, out=str(out), device="cpu"),):
            print(sample.draw(cfg))
        model = deco.DeCo.from_pretrained(run)
        deco.hub.card(model, model.info)
    def draw_words(): print(sample.draw(sample.Sampling(run=str(run.parent / "words"), num_images=1, steps=1,
                                                       out=str(out), device="cpu")))
    def compare():
        with mock.patch.object(evaluate, "save_spectra"):                       # half a second each
            evaluate.compare_reports(folder / "report.json", folder / "other.json", folder / "compared")
    def claim():
        settings = sample.read_samples(folder / "samples.json")
        evaluate.cautions(dict(notes=[], extractor="e 1", n=4), settings, [0, 1], torch.tensor([0, 1]))
        sample.claim(folder / "claimed", report["settings"])
    def read_statistics(name):
        real = metrics.reference_statistics(folder / name, extractor)
        metrics.compare(stats | tensors, real)
    return {run / "config.json": draw, run.parent / "words/config.json": draw_words,
            folder / "report.json": compare, folder / "samples.json": claim,
            folder / "prompts.jsonl": lambda: geneval.read_items(folder / "prompts.jsonl"),
            run / "model.safetensors": draw,
            folder / "model.ckpt": lambda: load_official(folder / "model.ckpt"),
            folder / "images.npz": lambda: list(metrics.image_batches(folder / "images.npz")),
            folder / "adm.npz": lambda: read_statistics("adm.npz"),
            folder / "stats.safetensors": lambda: read_statistics("stats.safetensors")}


def files(folder: Path, share: float, seed: int, bombed: bool = True) -> Iterator[Case]:
    "Edit every key of every JSON file, cut and change the binary ones, and put bombs into them."
    run = make_run(folder)
    if bombed: yield from bombs(folder / "bombs", run)
    for path, read in make_files(folder, run).items():
        whole = path.read_bytes()
        if path.suffix in (".json", ".jsonl"): changed = edits(json.loads(whole))
        else: changed = damages(whole, seed)
        for what, content in some(changed, share, seed):
            if isinstance(content, str): path.write_text(content, "utf-8")
            else: path.write_bytes(content)
            yield f"{path.name}: {what}", judged(read)
        path.write_bytes(whole)
        yield f"{path.name}: whole", judged(read)


def bombs(folder: Path, run: Path, megabytes: int = 2000) -> Iterator[Case]:
    """Give small files that ask for much, or hide a number that is none: each must be refused.

    megabytes: what those that are packed unpack to.
    """
    folder.mkdir(exist_ok=True)
    config = json.loads((run / "config.json").read_text("utf-8"))
    weights = (run / "model.safetensors").read_bytes()
    def load_with(info):
        (folder / "config.json").write_text(json.dumps(info), "utf-8")
        (folder / "model.safetensors").write_bytes(weights)
        return judged(lambda: deco.load(folder), refused=True)
    deep = 10 if megabytes < 1000 else 1000
    for name, value in (("depth", deep), ("depth", 10**6), ("decoder_depth", 10), ("decoder_depth", 10**7),
                        ("width", 2**15), ("width", 10**9), ("num_classes", 10**7), ("num_classes", 10**12)):
        yield f"config.json {name} {value}", load_with(config | dict(model=config["model"] | {name: value}))
    for classes in ("cat", ["cat"], [1, 2], list("abcdefg")):
        yield f"config.json classes {classes}", load_with(config | dict(classes=classes))

    state = torch.load(Path(__file__).parent.parent / "tests/golden/lightning_tiny.ckpt", weights_only=True)
    state = {k.removeprefix("ema_denoiser."): v for k, v in state["state_dict"].items() if k[:4] == "ema_"}
    block = next(k for k in state if ".1." in k and k.startswith("blocks."))
    bomb = folder / "bomb.ckpt"
    wide = {k: v[:1].expand(2**14, *v.shape[1:]) if v.ndim else v for k, v in state.items()}
    for what, found in (("blocks.99999999", state | {block.replace(".1.", ".99999999."): state[block]}),
                        ("tensors larger than their numbers", wide),
                        ("keys that are numbers", {1: torch.ones(1)}),
                        ("sparse", {k: v.to_sparse() for k, v in state.items()}),
                        ("empty", {k: torch.zeros(0) for k in state})):
        torch.save(found, bomb)
        yield f"ckpt: {what}", judged(lambda: load_official(bomb), refused=True)
    with zipfile.ZipFile(bomb) as old: parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name, part in parts.items(): new.writestr(name, part if part else b"")
        with new.open("archive/data/999", "w") as f:
            for _ in range(megabytes): f.write(bytes(10**6))
    yield "ckpt: packed", judged(lambda: load_official(bomb), refused=True)

    for name, shape, descr in (("arr_0", (2, 25_000, 25_000, 3), "|u1"),
                               ("mu", (megabytes * 125_000,), "<f8")):
        path = folder / f"{name}.npz"
        with (zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z,
              z.open(f"{name}.npy", "w", force_zip64=True) as f):
            np.lib.format.write_array_header_1_0(f, dict(descr=descr, fortran_order=False, shape=shape))
            for _ in range(megabytes): f.write(bytes(10**6))
        extractor = metrics.Extractor("x", lambda x: None)
        yield f"npz: {name} of {shape}", judged(lambda: metrics.reference_statistics(path, extractor), True)

    # numbers that are none
    for tensor in ("head.linear.bias", "blocks.0.attn.qkv.weight"):
        for number in (float("nan"), float("inf")):
            model, info = deco.load(run)
            with torch.no_grad(): model.get_parameter(tensor).view(-1)[0] = number
            deco.save(folder, model, info)
            cfg = sample.Sampling(run=str(folder), num_images=1, steps=1, out=str(folder / "x.png"))
            yield f"{tensor} {number}: deco.sample", judged(lambda: sample.draw(cfg), True)
            def draw(): deco.sample_images(model, [0], 16, steps=1)
            yield f"{tensor} {number}: Python", judged(draw, True)
    model, _ = deco.load(run)
    check_finite(model, "whole")
    for guidance in (1e30, 1e39):
        def draw(): deco.sample_images(model, [0], 16, steps=4, guidance=guidance)
        yield f"guidance {guidance}", judged(draw, True)


# --- the page

def page(folder: Path, share: float, seed: int) -> Iterator[Case]:
    "Serve scenes-toy; ask wrongly, from elsewhere, too often, and leave; then Ctrl-C while it draws."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "deco.demo", "scenes-toy", "--port", str(port)],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    def connection(): return http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    def ask(method, path, body=None, **headers):
        c = connection()
        c.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = c.getresponse()
        return answer.status, answer.read().decode()
    def join(values):
        body = json.dumps(dict(data=values))
        return ask("POST", "/gradio_api/call/draw", body, Content_Type="application/json")
    def draw(values):
        status, text = join(values)
        if status != 200: return text
        return ask("GET", f"/gradio_api/call/draw/{json.loads(text)['event_id']}")[1]
    def wrong(found, expected): return "" if found == expected else f"{found}, not {expected}"

    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if server.poll() is not None: raise OSError(server.stdout.read().decode())
            time.sleep(0.2)
        for route in ("/", "/config", "/gradio_api/info", "/gradio_api/upload", "/gradio_api/queue/join",
                      "/gradio_api/call/draw", "/gradio_api/run/draw"):
            for method in ("GET", "POST"):
                for headers in (dict(Origin="http://evil.example"), dict(Origin="null"),
                                dict(Host="evil.example"), dict(Host=f"evil.example:{port}"),
                                dict(Origin="http://127.0.0.1:1")):
                    yield f"{method} {route} {headers}", wrong(ask(method, route, "{}", **headers)[0], 403)
        yield "upload", wrong(ask("POST", "/gradio_api/upload", b"x")[0], 403)
        yield "large body", wrong(ask("POST", "/gradio_api/queue/join", bytes(10**6))[0], 413)
        right = ["a photo of a circle", "", 3, 4, "adams", 0, 32, 32]
        names = "prompt", "negative", "guidance", "steps", "solver", "seed", "height", "width"
        for i, field in enumerate(names):
            for what, v in some([(f"{field} {v!r:.30}", v) for v in VALUES], share, seed):
                text = draw([*right[:i], v, *right[i + 1:]])
                fine = "event: complete" in text or ('"error": "' in text and "Traceback" not in text)
                yield f"page: {what}", "" if fine or "too large" in text else text[:200]
        yield "right", "" if "event: complete" in draw(right) else "not drawn"

        long = [*right[:3], 1000, *right[4:]]
        start = time.time()
        c = connection()
        c.request("GET", f"/gradio_api/call/draw/{json.loads(join(long)[1])['event_id']}")
        time.sleep(0.5)
        c.sock.close()                                          # it leaves
        c.close()
        draw(right)
        waited = time.time() - start
        yield "a client left", "" if waited < 8 else f"the next waited {waited:.0f} s"
        status = [join(long)[0] for _ in range(30)]
        yield "30 jobs", "" if status.count(503) >= 8 else str(status)
        time.sleep(1)
        server.send_signal(signal.SIGINT)
        time.sleep(0.1)
        server.send_signal(signal.SIGINT)
        yield "Ctrl-C while it draws", wrong(server.wait(30), 0)
    finally: server.kill()


def runs(folder: Path, share: float, seed: int) -> Iterator[Case]:
    "What people, disks and schedulers do to a run: the cases of tools/faults.py."
    import faults
    chosen = some([(name,) for name in faults.CASES], share, seed)
    yield from faults.results([name for name, in chosen])


GROUPS = dict(numbers=numbers, files=files, page=page, runs=runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    parser.add_argument("--seed", type=int, default=0, help="which cases, where not all")
    parser.add_argument("--memory", type=float, default=8.0, help="GB of address space")
    args = parser.parse_args()
    with contextlib.suppress(ImportError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (int(args.memory * 1e9),) * 2)
    for name in args.groups:
        tried = held = 0
        with tempfile.TemporaryDirectory() as folder:
            for what, problem in GROUPS[name](Path(folder), args.share, args.seed):
                tried += 1
                held += not problem
                if problem: print(f"{name}: {what!r:.120}: {problem}", flush=True)
        print(f"{name}: {tried} tried, {held} held", flush=True)


if __name__ == "__main__": main()
