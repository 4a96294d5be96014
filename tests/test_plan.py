"The plan of a run beside what torch counts: parameters, FLOPs, activations, shards, collectives; complaints."
import re
from dataclasses import replace
from unittest.mock import patch
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from conftest import apart, run
from deco import ablate
from deco import plan as planning
from deco.config import Config, parse, PRESETS
from deco.decoder import FieldHead, PixelDecoder
from deco.dit import PatchHead, RECOMPUTE
from deco.model import build, create, model_args, SIZES
from deco.plan import (activations, communication, flops, flops_per_image, memory, parameters, plan, show,
                       step_flops)
from deco.train import Run


def named(name, **overrides): return SIZES[name] | overrides


def inputs(size, n, device="cpu"):
    x, t, y = torch.zeros(n, 3, *size), torch.zeros(n), torch.zeros(n, dtype=torch.long)
    return x.to(device), t.to(device), y.to(device)


@pytest.mark.parametrize("name,total", [("deco-l", 426_938_019), ("deco-xl", 682_282_851),
                                        ("dit-l", 459_171_584)])
def test_parameters(name, total):
    p = parameters(named(name))
    assert p["total"] == total == SIZES[name]["depth"] * p["block"] + p["rest"]


def test_shards_are_cut_as_torch_cuts():
    for name, ranks in (("deco-toy", 5), ("dit-tiny", 7), ("deco-tiny", 512)):
        first = {key: p.chunk(ranks)[0].numel() for key, p in create(name).named_parameters()}
        count = parameters(named(name), ranks)
        assert count["total"] == sum(first.values())
        assert count["block"] == sum(n for key, n in first.items() if key.startswith("blocks.0."))


@pytest.mark.parametrize("name,size,depth", [("deco-toy", (32, 48), 3), ("dit-toy", (64, 32), 2),
                                             ("deco-tiny", (16, 16), 2), ("deco-xl", (256, 384), 2)])
def test_flops(name, size, depth):
    for mode in RECOMPUTE:
        config = named(name, depth=depth, recompute=mode)
        with torch.device("meta"): model = create(name, depth=depth, recompute=mode)
        with FlopCounterMode(display=False) as forward: v = model(*inputs(size, 1, "meta"))
        with FlopCounterMode(display=False) as backward: v.sum().backward()
        assert sum(flops(config, size).values()) == forward.get_total_flops()
        both = forward.get_total_flops() + backward.get_total_flops()
        assert step_flops(config, size) == pytest.approx(both, rel=0.05)


def config_of(cfg):
    "The configuration of a run's model."
    config = named(cfg.model, num_classes=10) | model_args(cfg.model_args)
    return config | (dict(text_width=384, text_length=cfg.text_length) if cfg.text else {})


def assert_counts_as_torch(config, size):
    # low_pass has tables that need numbers; on a CPU torch counts attention where it is not fused
    with torch.device("cpu" if config.get("low_pass") else "meta"), sdpa_kernel(SDPBackend.MATH):
        model = build(config)
        x, t, y = torch.zeros(1, 3, size, size), torch.zeros(1), model.blank(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter: model(x, t, y)
    assert sum(flops(config, size).values()) == counter.get_total_flops()
    assert flops_per_image(model, size) == 3 * counter.get_total_flops()


@pytest.mark.parametrize("row", ablate.ROWS)
def test_flops_of_every_ablation(row):
    cfg, _ = parse(["--preset", "cifar10"])
    cfg = replace(cfg, **ablate.ROWS[row])
    assert_counts_as_torch(config_of(cfg), cfg.size)


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_every_preset(preset):
    cfg, _ = parse(["--preset", preset])
    assert_counts_as_torch(config_of(cfg), cfg.size)


def test_every_frozen_network_is_counted():
    "86.6 million float32 parameters for each use of DINOv2-B."
    def gigabytes(*flags):
        bill = planning.cost(parse(["--preset", "deco-xl-256", *flags])[0])
        found = re.search(r"encoder ([\d.]+) GB", bill)
        return float(found[1]) if found else 0.0
    assert gigabytes("--repa", "none") == 0
    assert gigabytes("--repa", "none", "--perceptual", "dinov2-b") == gigabytes() == 0.35
    assert gigabytes("--perceptual", "dinov2-b") == 0.69
    assert gigabytes("--lpips-weight", "0.1") == 0.41                      # VGG's 14.7 million and 0.35


def test_heads_say_what_they_are():
    titles = {head.title for head in (PatchHead, PixelDecoder, FieldHead)}
    assert len(titles) == 3 and all(titles)


def test_a_model_that_nobody_knows():
    with pytest.raises(ValueError, match="^there is no 'decoder_colour', but"):
        flops(named("deco-toy", decoder_colour="red"), 32)

    def other_head(config):
        model = build(config)
        model.head = torch.nn.Linear(1, 1)
        return model
    uncached = planning._built.__wrapped__
    with patch.object(planning, "build", other_head), patch.object(planning, "_built", uncached):
        for count in (flops, activations):
            with pytest.raises(ValueError, match="^the head Linear does not say what it costs"):
                count(named("deco-toy"), 32)


def kept(model, size, n, device="cpu"):
    "Bytes of the storages, other than the model's, that autograd keeps for n images."
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(t):
        key = t.untyped_storage()._cdata
        if key not in weights: seen[key] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): model(*inputs(size, n, device))
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def kept_per_image(config, size, precision):
    "What a second image adds. In bf16 by CUDA's rules, on fake tensors."
    if precision == "float32":
        model = build(config)
        return kept(model, size, 2) - kept(model, size, 1)

    def flash(q, k, v, attn_mask=None): return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    with FakeTensorMode(), patch("torch.nn.functional.scaled_dot_product_attention", flash):
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            with torch.device("cuda"): model = build(config)
            return kept(model, size, 2, "cuda") - kept(model, size, 1, "cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


ACTIVATIONS = [("deco-toy", (32, 48), {}), ("deco-tiny", (16, 16), {}), ("dit-toy", (32, 32), {}),
               ("dit-toy", (32, 32), dict(depth=3, field_width=16)),
               ("deco-toy", (32, 32), dict(decoder_patch=8)), ("deco-toy", (32, 32), dict(decoder_patch=2)),
               ("deco-toy", (32, 32), dict(decoder_interaction="add"))]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name,size,changed", ACTIVATIONS)
def test_activations(name, size, changed, precision):
    for mode in RECOMPUTE:
        config = named(name, recompute=mode) | dict(depth=2) | changed
        parts, _ = activations(config, size, precision)
        counted = sum(parts.values()) - parts["loss"]
        assert counted == pytest.approx(kept_per_image(config, size, precision), rel=0.05), mode


def test_older_names_of_recompute():
    for old, new in ((False, "none"), (True, "cheap")):
        counts = [activations(named("deco-toy", recompute=name), 32) for name in (old, new)]
        assert counts[0] == counts[1]


RANKS = 24

@pytest.fixture(scope="module")
def rehearsed():
    "Rank 0 of many, on a fake process group, in a process of its own: a row for each precision."
    return apart(rehearsals)


def rehearsals():
    import rehearse                                             # it changes torch: not in this process
    config = named("deco-toy", depth=2)
    return {p: rehearse.rehearse(config, 32, RANKS, p) for p in ("float32", "bf16")}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rehearsal(precision, rehearsed, ranks=RANKS):
    row = rehearsed[precision]
    m = memory(named("deco-toy", depth=2), 32, 1, parallel="fsdp", gpus=ranks)
    c = communication(named("deco-toy", depth=2), precision=precision, parallel="fsdp", gpus=ranks)
    assert row["weights"] == m["weights"] and row["gradients"] == m["gradients"]
    assert row["moments"] == m["moments"]
    whole = ranks / (ranks - 1)
    assert row["gathered"] == pytest.approx(whole * c["all-gather"], rel=1e-6)
    assert row["scattered"] == pytest.approx(whole * c["reduce-scatter"], rel=1e-6)


def test_moments_of_muon():
    "What a run with Muon keeps of its weights, beside what is planned."
    kept = Run(Config(model="deco-toy", optimizer="muon"), 10, "cpu").tensors()
    sizes = [4 * moment.numel() for name, moment in kept.items() if name.startswith(("momentum.", "exp_avg"))]
    assert sum(sizes) == memory(named("deco-toy", num_classes=10), 32, 1, optimizer="muon")["moments"]


def test_network_of_one_gpu_is_silent():
    toy = named("deco-toy")
    for parallel in ("ddp", "fsdp"): assert not any(communication(toy, parallel=parallel).values())
    assert communication(toy, gpus=2)["all-reduce"] == 4 * parameters(toy)["total"]


def test_plan():
    large, ways = named("deco-l"), dict(parallel="fsdp", gpus=8, precision="bf16")
    p = plan(large, 256, batch_size=256, images=1000, micro_batch=16, **ways)
    assert p["steps"] == 4 and p["micro_batch"] == 16
    assert p["seconds"] == pytest.approx(32 * p["step_flops"] / (0.4 * 312e12))
    assert p["hours"] == pytest.approx(4 * p["seconds"] / 3600)
    once = communication(large, parallel="fsdp", gpus=8, precision="bf16")
    # of two passes, the last exchanges gradients
    assert p["communication"] == {"all-gather": pytest.approx(2 * once["all-gather"], abs=2),
                                  "reduce-scatter": once["reduce-scatter"]}
    text = show(p)
    assert "426,938,019" in text and "fits" in text and all(len(line) < 250 for line in text.splitlines())
    assert "DOES NOT FIT" in show(plan(large, 256, batch_size=256, images=1000, gpus=8, capacity=15.0))

    def used(n): return sum(memory(large, 256, n, passes=2, **ways).values())
    assert used(p["largest"]) <= 80e9 < used(p["largest"] + 1)


COMPLAINTS = [
    (["--preset", "nonsense"], "--preset"), (["--size", "30", "--preset", "openmoji"], "--size"),
    (["--size", "0"], "--size"), (["--gpus", "3"], "--gpus"), (["--gpus", "0"], "--gpus"),
    (["--gpus", "many"], "--gpus"), (["--batch-size", "-4"], "--batch-size"),
    (["--micro-batch", "5"], "--micro-batch"), (["--tflops", "nan"], "--tflops"),
    (["--capacity", "0"], "--capacity"), (["--bandwidth", "inf"], "--bandwidth"),
    (["--images", "0"], "--images"), (["--parallel", "pipeline"], "--parallel"),
    (["--speed", "9"], "--speed"),
    (["--model-args", "colour=3"], "colour")]


@pytest.mark.parametrize("flags,word", COMPLAINTS)
def test_complaints(flags, word): assert word in run(planning, *flags)


def test_data_that_is_elsewhere(capsys):
    assert run(planning, "--data", "nosuch") == ""
    assert capsys.readouterr().err == "note: nosuch is not looked up here: counted as 1,000 classes\n"
    assert run(planning) == "" and not capsys.readouterr().err


def test_command(capsys):
    for preset in PRESETS:
        assert run(planning, "--preset", preset) == ""
        assert "parameters" in capsys.readouterr().out
