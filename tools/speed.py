"""How fast is `deco`, beside a literal transcription of the paper's equations and beside the machine?

    python tools/speed.py train     a training step of deco-l, 256 pixels, batch 2: time and activation memory
    python tools/speed.py sample    50 Euler steps of deco-l at guidance 3.2 on [0.1, 1], 256 pixels, batch 1
    python tools/speed.py toy       a training step of the toy model: its share of the matrix product's rate
    python tools/speed.py --out nbs/results/speed.json train sample toy      all, kept as JSON

The transcription is tests/naive.py. Both sides run in one process, in turn, on the same weights, in float32.
Each job has a process of its own, so that it does not find the heap that another left: freed memory that is
kept, or given back and paged in anew, is worth ten per cent on a CPU. On two cores `train` takes two minutes,
`sample` four, `toy` half a minute. Peak activation memory is what lives at most besides weights, gradients
and optimizer state, which exist beforehand on both sides.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import naive
from deco.core import pick_device
from deco.dct import frequency_loss, jpeg_weights
from deco.flow import flow_loss, interpolate, sample, velocity
from deco.model import create


def clock(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def in_turn(sides: dict, rounds: int) -> dict[str, list[float]]:
    "Times of every side, once around to warm up, then `rounds` times in turn."
    for f in sides.values(): f()
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, f in sides.items(): times[name].append(clock(f))
    return times


def peak_bytes(f) -> int:
    "The most bytes of tensors that f() has alive at once, beyond those that lived before."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for _, n in sorted((e.start_ns(), e.nbytes()) for e in events):
        alive += n
        peak = max(peak, alive)
    return peak


def flops(f) -> int:
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()


def matmul_rate(n: int = 4096) -> float:
    "FLOP/s of a large float32 matrix product, the best of five."
    a = torch.randn(n, n)
    return 2 * n**3 / min(clock(lambda: a @ a) for _ in range(5))


def fill_zeros(model):
    "Give the zero-initialised parameters values, so that nothing is skipped by luck."
    g = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for p in model.parameters():
        if not p.any(): p.data.normal_(std=0.02, generator=g)
    return model


def problem(model, size: int, batch: int):
    "The two losses, ours and the transcription's, on the same fixed batch."
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(batch, 3, size, size, generator=g) for _ in range(2))
    t = torch.rand(batch, generator=g)
    y = torch.arange(batch) % model.num_classes
    params, weights = dict(model.named_parameters()), jpeg_weights()
    def ours():
        v, target = model(interpolate(x, noise, t), t, y), velocity(x, noise)
        return flow_loss(v, target) + frequency_loss(v, target)
    def literal(): return naive.loss(params, model.config, x, noise, t, y, weights)
    return ours, literal


def stepper(loss, model, **adam):
    "A whole training step. Gradients stay allocated."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, **adam)
    def step():
        optimizer.zero_grad(set_to_none=False)
        loss().backward()
        optimizer.step()
    return step


def compare(times) -> dict:
    median = {k: statistics.median(v) for k, v in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["naive"], times["ours"]))
    return dict(seconds=times, ratio=ratio, median=median)


def bench_train(model, rounds: int) -> dict:
    ours, literal = problem(model, 256, 2)
    a, b = ours(), literal()
    assert abs(a - b) < 1e-4 * abs(b), "the two sides compute different losses"
    work = flops(lambda: ours().backward())
    sides = dict(naive=stepper(literal, model), ours=stepper(ours, model, fused=True))
    result = compare(in_turn(sides, rounds))
    losses = dict(naive=literal, ours=ours)
    memory = {name: peak_bytes(lambda: loss().backward()) / 1e9 for name, loss in losses.items()}
    share = work / result["median"]["ours"] / matmul_rate()
    memory_ratio = memory["ours"] / memory["naive"]
    return result | dict(flops=work, share=share, activation_GB=memory, memory_ratio=memory_ratio)


def bench_sample(model, rounds: int) -> dict:
    noise = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([1])
    params = dict(model.named_parameters())
    settings = dict(steps=50, guidance=3.2, interval=(0.1, 1.0))
    images = {}
    def literal(): images["naive"] = naive.euler(params, model.config, noise, y, **settings)
    def ours(): images["ours"] = sample(model, noise, y, **settings)
    times = dict(naive=[], ours=[])
    for _ in range(rounds):
        times["naive"].append(clock(literal))
        times["ours"].append(clock(ours))
    assert torch.allclose(images["naive"], images["ours"], atol=1e-2), "the two sides draw different images"
    return compare(times)


def bench_toy(name: str, rounds: int) -> dict:
    model = fill_zeros(create(name, num_classes=10))
    ours, literal = problem(model, 32, 32)
    work = flops(lambda: ours().backward())
    rate = matmul_rate()
    sides = dict(naive=stepper(literal, model), ours=stepper(ours, model, fused=True))
    result = compare(in_turn(sides, rounds))
    share = {k: work / v / rate for k, v in result["median"].items()}
    return result | dict(flops=work, matmul_rate=rate, share=share)


def alone(job: str, rounds: int) -> dict:
    "The result of a job that has a process of its own."
    command = [sys.executable, __file__, job, "--rounds", str(rounds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", nargs="+", choices=("train", "sample", "toy"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    pick_device("cpu")                                             # as every command does, for both sides
    result = dict(torch=torch.__version__, threads=torch.get_num_threads(), machine=platform.machine())
    if len(args.what) > 1:
        for job in args.what: result |= alone(job, args.rounds)
    elif "train" in args.what: result["train"] = bench_train(fill_zeros(create("deco-l")), args.rounds)
    elif "sample" in args.what: result["sample"] = bench_sample(fill_zeros(create("deco-l")), 1)
    else: result["toy"] = bench_toy("deco-toy", 10 * args.rounds)
    result["matmul_GFLOPs"] = matmul_rate() / 1e9
    print(json.dumps(result, indent=1))
    if args.out: args.out.write_text(json.dumps(result, indent=1), "utf-8")


if __name__ == "__main__": main()
