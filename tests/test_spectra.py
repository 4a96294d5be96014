"Spectra of maps whose spectra are known."
import math
import pytest
import scipy.fft
import torch
from deco.dct import dct_spectrum, zigzag
from deco.spectra import block_energy, normalise, token_map


@pytest.mark.parametrize("side", [4, 8])
def test_white_noise_is_flat(side):
    x = torch.randn(200, 5, 32, 32)
    blocks = x.numel() / side**2
    assert (block_energy(x, side) - 1).abs().max() < 5.5 * math.sqrt(2 / blocks)   # chi-squared: variance 2


def test_constant_is_frequency_0():
    energy = block_energy(torch.full((2, 3, 16, 24), -0.5))
    assert energy[0] == pytest.approx(0.25 * 64, rel=1e-5) and energy[1:].abs().max() < 1e-6


@pytest.mark.parametrize("i,j", [(0, 3), (2, 5), (7, 7)])
def test_cosine_is_one_frequency(i, j):
    row, column = (torch.cos(math.pi * (2 * torch.arange(8) + 1) * k / 16) for k in (i, j))
    energy = block_energy((row[:, None] * column).repeat(2, 3)[None, None])
    place = zigzag(8).tolist().index(8 * i + j)
    factor = 2 if 0 in (i, j) else 1
    assert energy[place] == pytest.approx(64 / 4 * factor, rel=1e-4)
    assert energy.sum() == pytest.approx(energy[place].item(), rel=1e-4)


def test_scipy_and_the_spectrum_of_images():
    x = torch.randn(3, 2, 8, 16)
    blocks = x.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4)).transpose(-3, -2)
    coefficients = torch.from_numpy(scipy.fft.dctn(blocks.numpy(), axes=(-2, -1), norm="ortho"))
    theirs = coefficients.square().mean((0, 1, 2, 3)).flatten()
    assert torch.allclose(block_energy(x, 4), theirs[zigzag(4)], rtol=1e-4)
    assert torch.allclose(block_energy(x), dct_spectrum(x).mean(0), rtol=1e-4)


def test_maps_and_scale():
    tokens = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    assert torch.equal(token_map(tokens, (2, 3))[1, :, 1, 2], tokens[1, 5])
    with pytest.raises(ValueError, match="6 tokens"): token_map(tokens, (2, 2))
    with pytest.raises(ValueError, match="blocks of 8"): block_energy(torch.zeros(1, 1, 8, 12))
    energy = torch.tensor([3.0, 1.0, 0.0])
    assert torch.allclose(normalise(energy), torch.tensor([1.0, 0.5, 0.0]))
    assert not torch.allclose(normalise(4 * energy), normalise(energy))
