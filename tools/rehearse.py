"""Rehearse a sharded training step with many ranks in one process, without their memory and without a GPU.

    python tools/rehearse.py --model deco-xl --ranks 64 512       prints one JSON object per number of ranks

With torch's fake process group and fake tensors, rank 0 builds the model, shards every block and the root
(FSDP2), runs forward and backward of one image and steps AdamW. Counted are the bytes of its shards, the
bytes of the whole tensors that the collectives gather and scatter, and what torch's own memory tracker
finds beside the shards at the peak (of a second backward pass, when gradients exist). `--depth` shortens
the model.
"""
import argparse
import json
import time
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from deco.model import SIZES, build
from deco.train import block_policy


class Collectives(TorchDispatchMode):
    "Bytes of the whole tensor of every all-gather and reduce-scatter."
    def __init__(self):
        super().__init__()
        self.bytes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.removeprefix("c10d::")
        if name in self.bytes: self.bytes[name] += max(a.nbytes for a in args if isinstance(a, torch.Tensor))
        return f(*args, **(kwargs or {}))


def local_bytes(tensors) -> int:
    "Bytes of rank 0's shards."
    return sum(v.to_local().nbytes for v in tensors)


def rehearse(config: dict, size: int, ranks: int, precision: str = "float32") -> dict:
    "Bytes of rank 0's weights, gradients and moments; of a step's collectives; beside the shards."
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    start = time.time()
    try:
        mesh = dist.init_device_mesh("cpu", (ranks,))
        with FakeTensorMode():
            model = build(config)
            grid = (size // model.patch_size,) * 2
            model.grid = lambda x, y: grid              # the real one looks at the labels' values
            for block in model.blocks: fully_shard(block, mesh=mesh, mp_policy=block_policy(precision))
            fully_shard(model, mesh=mesh)
            x = torch.zeros(1, model.config["channels"], size, size)
            t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
            def backward():
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): v = model(x, t, y)
                v.float().square().mean().backward()
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            with Collectives() as collectives: backward()
            optimizer.step()
            moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
            result = dict(weights=local_bytes(model.parameters()),
                          gradients=local_bytes(p.grad for p in model.parameters()),
                          moments=local_bytes(moments),
                          gathered=collectives.bytes["_allgather_base_"],
                          scattered=collectives.bytes["_reduce_scatter_base_"])
            tracker = FSDPMemTracker(model, None)
            with tracker: backward()
            device, = tracker.get_tracker_snapshot("peak").values()
            peak = {str(kind).rpartition(".")[2]: size for kind, size in device.items()}
        beside = peak["Total"] - peak["SHARDED_PARAM"] - peak["SHARDED_GRAD"]
        return result | dict(beside=beside, seconds=round(time.time() - start, 1))
    finally: dist.destroy_process_group()


def main(argv: list[str] | None = None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=SIZES, default="deco-xl")
    parser.add_argument("--depth", type=int, help="blocks (default: all)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64])
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    args = parser.parse_args(argv)
    config = SIZES[args.model] | dict(recompute="blocks")
    if args.depth: config["depth"] = args.depth
    for ranks in args.ranks:
        setup = dict(model=args.model, depth=config["depth"], size=args.size, ranks=ranks,
                     precision=args.precision)
        print(json.dumps(setup | rehearse(config, args.size, ranks, args.precision)))


if __name__ == "__main__": main()
