"What the backward pass computes again changes memory and time, not gradients: under autocast, DDP and FSDP2."
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from conftest import two
from deco.dit import RECOMPUTE
from deco.model import create, DeCo

CASES = ("ddp", "ddp autocast", "fsdp", "fsdp autocast")           # as deco.train wraps a model


def model(recompute, name="deco-tiny"):
    torch.manual_seed(0)
    m = create(name, num_classes=3, recompute=recompute)
    for p in m.parameters():
        if not p.any(): p.data.normal_(std=0.05)                 # zeros would hide mistakes
    return m


def gradients(recompute, case, rank=0, name="deco-tiny"):
    "Gradients by parameter name of two steps' backward passes, whole on every rank."
    m = model(recompute, name)
    if case.startswith("fsdp"):
        for block in m.blocks: fully_shard(block)
        fully_shard(m)
    run = DistributedDataParallel(m) if case.startswith("ddp") else m
    g = torch.Generator().manual_seed(rank)
    for _ in range(2):                             # gradients add up; the second pass finds resharded weights
        x, t, y = torch.randn(4, 3, 16, 16, generator=g), torch.rand(4, generator=g), torch.arange(4) % 3
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case):
            v, tokens = run(x, t, y, layers=(1,))
        (v.float().square().mean() + tokens[0].float().square().mean()).backward()
    grads = {n: p.grad for n, p in m.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def differences(case, rank=0, name="deco-tiny"):
    plain = gradients("none", case, rank, name)
    for choice in RECOMPUTE[1:]:
        for n, g in gradients(choice, case, rank, name).items():
            assert (g - plain[n]).norm() <= 1e-5 * plain[n].norm() > 0, f"{case}, {choice}: {n}"


def main(argv):
    "What each of two processes does."
    dist.init_process_group("gloo")
    for case in CASES: differences(case, dist.get_rank())
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["deco-tiny", "dit-toy"])
@pytest.mark.parametrize("case", ["float32", "autocast"])
def test_one_process(case, name): differences(case, name=name)


def test_two_processes(): two("test_recompute")


def test_names():
    "Older configurations hold false or true; anything else is one line."
    small = dict(patch_size=8, width=64, depth=1, heads=2, decoder_width=8, decoder_depth=1)
    choices = [DeCo(**small, recompute=r).config["recompute"] for r in (False, True, *RECOMPUTE)]
    assert choices == ["none", "cheap", *RECOMPUTE]
    for wrong in ("all", None, 2, []):
        with pytest.raises(ValueError, match=r"^recompute must be one of none, cheap, blocks, not .*$"):
            DeCo(**small, recompute=wrong)
