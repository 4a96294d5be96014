"The plan of a run beside what torch counts: parameters, FLOPs, activations, shards, collectives; and the command's complaints."
import json
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from conftest import run
from deco import plan as planning
from deco.dit import RECOMPUTE
from deco.model import COLUMNS, SIZES, create
from deco.plan import activations, communication, flops, memory, parameters, plan, show, step_flops


def named(name, **overrides): return dict(zip(COLUMNS, SIZES[name])) | overrides


def inputs(size, n, device="cpu"):
    return torch.zeros(n, 3, *size, device=device), torch.zeros(n, device=device), torch.zeros(n, dtype=torch.long, device=device)


@pytest.mark.parametrize("name,total", [("deco-l", 426_938_019), ("deco-xl", 682_282_851), ("dit-l", 459_171_584)])
def test_parameters(name, total):
    p = parameters(named(name))
    assert p["total"] == total == SIZES[name][COLUMNS.index("depth")] * p["block"] + p["rest"]


def test_shards_are_cut_as_torch_cuts():
    for name, ranks in (("deco-toy", 5), ("dit-tiny", 7), ("deco-tiny", 512)):
        first = [(n, p.chunk(ranks)[0].numel()) for n, p in create(name).named_parameters()]
        assert parameters(named(name), ranks)["total"] == sum(n for _, n in first)
        assert parameters(named(name), ranks)["block"] == sum(n for key, n in first if key.startswith("blocks.0."))


@pytest.mark.parametrize("name,size,depth", [("deco-toy", (32, 48), 4), ("dit-toy", (64, 32), 6), ("deco-tiny", (16, 16), 2), ("deco-xl", (256, 384), 2)])
def test_flops(name, size, depth):
    for mode in RECOMPUTE:
        config = named(name, depth=depth, recompute=mode)
        with torch.device("meta"): model = create(name, depth=depth, recompute=mode)
        with FlopCounterMode(display=False) as forward: v = model(*inputs(size, 2, "meta"))
        with FlopCounterMode(display=False) as backward: v.sum().backward()
        counted = forward.get_total_flops() / 2, (forward.get_total_flops() + backward.get_total_flops()) / 2
        assert sum(flops(config, size).values()) == pytest.approx(counted[0], rel=0.03)
        assert step_flops(config, size) == pytest.approx(counted[1], rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name,size", [("deco-toy", (32, 48)), ("deco-tiny", (16, 16)), ("dit-toy", (32, 32))])
def test_activations(name, size, precision):
    "Per image: what a second image adds to the storages that autograd keeps. In bf16 by CUDA's rules, on fake tensors."
    from unittest.mock import patch
    from torch._subclasses.fake_tensor import FakeTensorMode
    def kept(model, n, device):
        own, seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}, {}
        def pack(t):
            if (key := t.untyped_storage()._cdata) not in own: seen[key] = t
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): model(*inputs(size, n, device))
        return sum(t.untyped_storage().nbytes() for t in seen.values())
    for mode in RECOMPUTE:
        if precision == "float32":
            model = create(name, recompute=mode)
            found = kept(model, 2, "cpu") - kept(model, 1, "cpu")
        else:
            flash = lambda q, k, v, attn_mask=None: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
            with FakeTensorMode(), patch("torch.nn.functional.scaled_dot_product_attention", flash):
                try:
                    torch.set_autocast_enabled("cuda", True)
                    torch.set_autocast_dtype("cuda", torch.bfloat16)
                    with torch.device("cuda"): model = create(name, recompute=mode)
                    found = kept(model, 2, "cuda") - kept(model, 1, "cuda")
                finally:
                    torch.set_autocast_enabled("cuda", False)
                    torch.clear_autocast_cache()
        parts, _ = activations(named(name, recompute=mode), size, precision)
        assert sum(parts.values()) - parts["loss"] == pytest.approx(found, rel=0.05), mode


def test_older_names_of_recompute():
    for old, new in ((False, "none"), (True, "cheap")): assert activations(named("deco-toy", recompute=old), 32) == activations(named("deco-toy", recompute=new), 32)


def test_rehearsal(ranks=24):
    "Rank 0 of many, on a fake process group, in a process of its own."
    code = f"import json, rehearse, deco.model as m; print(json.dumps(rehearse.rehearse(dict(zip(m.COLUMNS, m.SIZES['deco-toy'])), 32, {ranks})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent / "tools")
    found = json.loads(done.stdout.splitlines()[-1])
    m, c = memory(named("deco-toy"), 32, 1, parallel="fsdp", gpus=ranks), communication(named("deco-toy"), parallel="fsdp", gpus=ranks)
    assert (found["weights"], found["gradients"], found["moments"]) == (m["weights"], m["gradients"], m["Adam's moments"])
    whole = ranks / (ranks - 1)
    assert found["gathered"] == pytest.approx(whole * c["all-gather"], rel=1e-6) and found["scattered"] == pytest.approx(whole * c["reduce-scatter"], rel=1e-6)


def test_network_of_one_gpu_is_silent():
    for parallel in ("ddp", "fsdp"): assert not any(communication(named("deco-toy"), parallel=parallel).values())
    assert communication(named("deco-toy"), gpus=2)["all-reduce"] == 4 * parameters(named("deco-toy"))["total"]


def test_plan():
    p = plan(named("deco-l"), 256, batch_size=256, images=1000, gpus=8, micro_batch=16, parallel="fsdp", precision="bf16")
    assert p["steps"] == 4 and p["micro_batch"] == 16
    assert p["seconds"] == pytest.approx(32 * p["step_flops"] / 125e12) and p["hours"] == pytest.approx(4 * p["seconds"] / 3600)
    once = communication(named("deco-l"), parallel="fsdp", gpus=8)                             # of two passes, the last exchanges gradients
    assert p["communication"] == {"all-gather": pytest.approx(2 * once["all-gather"], abs=2), "reduce-scatter": once["reduce-scatter"]}
    text = show(p)
    assert "426,938,019" in text and "fits" in text and all(len(line) < 250 for line in text.splitlines())
    assert "DOES NOT FIT" in show(plan(named("deco-l"), 256, batch_size=256, images=1000, gpus=8, capacity=20.0))
    used = lambda n: sum(memory(named("deco-l"), 256, n, parallel="fsdp", gpus=8, precision="bf16", passes=2).values())
    assert used(p["largest"]) <= 80e9 < used(p["largest"] + 1)


@pytest.mark.parametrize("flags,flag", [(["--preset", "nonsense"], "--preset"), (["--size", "20", "--preset", "openmoji"], "--size"), (["--size", "0"], "--size"), (["--gpus", "3"], "--gpus"),
                                        (["--gpus", "0"], "--gpus"), (["--gpus", "many"], "--gpus"), (["--batch-size", "-4"], "--batch-size"), (["--micro-batch", "5"], "--micro-batch"),
                                        (["--tflops", "nan"], "--tflops"), (["--capacity", "0"], "--capacity"), (["--bandwidth", "inf"], "--bandwidth"),
                                        (["--images", "0"], "--images"), (["--parallel", "pipeline"], "--parallel"), (["--speed", "9"], "--speed")])
def test_complaints(flags, flag): assert flag in run(planning, *flags)


def test_command(capsys):
    from deco.config import PRESETS
    for preset in PRESETS:
        assert run(planning, "--preset", preset) == ""
        assert "parameters" in capsys.readouterr().out


def test_light():
    "deco.train uses the plan, so the plan must not import it."
    code = "import sys, deco.plan; sys.exit('deco.train' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
