"Agreement with the authors' code, on the files of tests/golden, as close as a faithful implementation comes."
import pytest
import torch
from PIL import Image
import deco
from deco.core import parameter_count
from deco.data import center_crop, to_tensor
from deco.dct import block_dct, frequency_loss, jpeg_weights, rgb_to_ycbcr
from deco.flow import logit_normal, sample
from oracle import GOLDEN, RUNS, golden, state


@pytest.mark.parametrize("name", ["c2i", "baseline"])
def test_velocity(name):
    f = golden(name)
    model = deco.load_official(state(f))
    for i in range(3):
        with torch.no_grad(): v = model(f[f"x{i}"], f[f"t{i}"], f[f"y{i}"])
        assert (v - f[f"v{i}"]).abs().max() < 1e-4


@pytest.mark.parametrize("ema, key", [(True, "v_ema"), (False, "v")])
def test_lightning(ema, key):
    f = golden("lightning_tiny")
    model = deco.load_official(GOLDEN / "lightning_tiny.ckpt", ema=ema)
    with torch.no_grad(): v = model(f["x"], f["t"], f["y"])
    assert (v - f[key]).abs().max() < 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_samplers(name):
    f = golden("samplers")
    model = deco.load_official(state(golden("c2i")))
    times, states = [], []
    def note(i, t, x):
        times.append(t)
        states.append(x)
    x = sample(model, f["noise"], f["y"], callback=note, **RUNS[name])
    assert (x - f[f"{name}.x"]).abs().max() < 1e-3
    assert (states[len(states) // 2] - f[f"{name}.x_mid"]).abs().max() < 1e-3
    assert torch.allclose(torch.tensor(times), f[f"{name}.timesteps"], atol=1e-6)


def test_frequency_loss():
    f = golden("freq_loss")
    for q in (10, 50, 85, 95):
        for gamma in (0.5, 1.0):
            assert torch.allclose(jpeg_weights(q, gamma), f[f"weight.q{q}.gamma{gamma}"], rtol=1e-5)
        for i in (0, 1):
            loss = frequency_loss(f[f"pred{i}"], f[f"target{i}"], q)
            assert torch.allclose(loss, f[f"loss{i}.q{q}"], rtol=1e-5)
    for i in (0, 1):
        assert torch.allclose(rgb_to_ycbcr(f[f"pred{i}"]), f[f"ycbcr{i}"], atol=1e-5)
        assert torch.allclose(block_dct(f[f"ycbcr{i}"]), f[f"dct{i}"], atol=1e-5)


def test_times_and_crop():
    f = golden("repa")
    for shift in (1.0, 2.0, 4.0):
        assert torch.allclose(logit_normal(f["normal"], shift=shift), f[f"t_shift{shift}"], atol=1e-5)
    f = golden("adm_crop")
    for i, size in enumerate((32, 32, 64, 32)):
        cropped = center_crop(Image.fromarray(f[f"in{i}"].numpy()), size)
        assert torch.equal(to_tensor(cropped).permute(1, 2, 0), f[f"out{i}"])


@pytest.mark.parametrize("name, count", [("deco-l", 426_938_019), ("deco-xl", 682_282_851),
                                         ("dit-l", 459_171_584), ("dit-xl", 676_360_128)])
def test_parameter_counts(name, count):
    with torch.device("meta"): assert parameter_count(deco.create(name)) == count
