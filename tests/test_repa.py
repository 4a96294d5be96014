"REPA: agreement with the authors' code, grids that fit or are refused, and weights files of every kind."
import sys
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from deco import repa
from deco.core import parameter_count
from deco.metrics import default_weights, load_extractor
from deco.repa import dino_input, dino_positions, dinov2, Encoder, load_encoder, Projector, repa_loss

timm = pytest.importorskip("timm")
GOLDEN = load_file(Path(__file__).parent / "golden" / "repa.safetensors")
SMALL = dict(embed_dim=24, depth=2, num_heads=2, img_size=56)


def complaint(f, *args, error=ValueError, **kw) -> str:
    with pytest.raises(error) as e: f(*args, **kw)
    text = str(e.value)
    assert "\n" not in text and len(text) < 1200
    return text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A small DINOv2 with random weights: timm's network and its file."
    torch.manual_seed(0)
    net = timm.create_model("vit_base_patch14_dinov2", num_classes=0, **SMALL).eval()
    with torch.no_grad():
        for p in net.parameters(): p.normal_(std=0.3)
    path = tmp_path_factory.mktemp("dino") / "small.safetensors"
    save_file(net.state_dict(), path)
    return net, path


@pytest.fixture
def small(monkeypatch):
    "load_encoder('dinov2-b') builds the small network."
    monkeypatch.setattr(repa, "dinov2", lambda path: dinov2(path, **SMALL))


def pixels(h, w, n=2):
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_golden():
    projector = Projector(24, 20, 32)
    state = {k.removeprefix("state.0."): v for k, v in GOLDEN.items() if k.startswith("state.")}
    projector.load_state_dict(state)
    projected = projector(GOLDEN["tokens"])
    assert (projected - GOLDEN["projected"]).abs().max() < 1e-5
    assert (repa_loss(projected, GOLDEN["target"]) - GOLDEN["loss"]).abs() < 1e-5
    assert (dino_input(GOLDEN["dino_in"], (4, 3)) - GOLDEN["dino_preprocessed"]).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["meta.pth", "timm.safetensors"])
def test_golden_dinov2(layout, tmp_path):
    "Features of Meta's own code, on its own grid and two others."
    f = load_file(Path(__file__).parent / "golden" / "dinov2.safetensors")
    path = tmp_path / layout
    state = {k.removeprefix("state."): v for k, v in f.items() if k.startswith("state.")}
    if layout == "meta.pth": torch.save(state, path)
    else: save_file({k: v for k, v in state.items() if k != "mask_token"}, path)
    net, run, features = dinov2(path, embed_dim=24, depth=2, num_heads=2, img_size=140)
    net.eval()
    for h, w in ((6, 6), (4, 6), (10, 10)):
        images = f["pixels"][:, :, :64] if h == 4 else f["pixels"]
        out = Encoder(run, features, "small")(images, (h, w))
        assert (out - f[f"features.{h}x{w}"]).abs().max() < 1e-4


def test_loss():
    a, b = torch.randn(2, 16, 20), torch.randn(2, 16, 20)
    assert repa_loss(a, 3 * a).abs() < 1e-6 and (repa_loss(a, -a) - 2).abs() < 1e-6
    expected = 1 - torch.nn.CosineSimilarity(-1)(a, b).mean()
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(repa_loss(a, b), expected)
    assert repa_loss(a.bfloat16(), b).dtype == torch.float32
    for shape in ((2, 9, 20), (2, 16, 21), (1, 16, 20), (16, 20)):
        assert "grid" in complaint(repa_loss, a, torch.randn(shape))
    assert parameter_count(Projector(1024, 768)) == 2 * (1024 * 1024 + 1024) + 1024 * 768 + 768


def test_encoder_grids():
    grey = Encoder(lambda x, grid: x.float().mean(1, keepdim=True), 1, "grey")
    x = pixels(16, 32)
    assert torch.equal(grey(x, (16, 32))[..., 0], x.float().mean(1).flatten(1))  # its own grid
    assert torch.allclose(grey(x, (2, 4)).mean(), x.float().mean(), atol=2)
    for grid in ((4, 2), (2, 3), (4, 4)): assert "16 x 32" in complaint(grey, x, grid)
    for wrong in (x.float(), x[0], x[:, :1]): assert "uint8" in complaint(grey, wrong, (2, 4))
    for out in ((2, 7, 1), (2, 9, 1), (2, 8, 2)):              # too few or too many tokens, other width
        assert "cut" in complaint(Encoder(lambda x, grid: torch.zeros(out), 1, "odd"), x, (2, 4))
    tokens = Encoder(lambda x, grid: torch.zeros(2, 8, 1, dtype=torch.bfloat16), 1, "tokens")
    assert tokens(x, (2, 4)).dtype == torch.float32


def test_encoder_has_no_gradient():
    layer = torch.nn.Conv2d(3, 5, 4, 4)
    assert not Encoder(lambda x, grid: layer(x.float()), 5, "conv")(pixels(16, 16), (4, 4)).requires_grad


@pytest.mark.parametrize("grid", [(4, 4), (4, 3), (2, 6), (7, 7)])
def test_dinov2(weights, small, grid):
    net, path = weights
    encoder = load_encoder("dinov2-b", path)
    x = pixels(16 * grid[0], 16 * grid[1])
    config = SMALL | dict(img_size=tuple(14 * n for n in grid))
    other = timm.create_model("vit_base_patch14_dinov2", num_classes=0, **config).eval()
    other.load_state_dict(net.state_dict() | {"pos_embed": dino_positions(net.pos_embed.data, grid)})
    with torch.no_grad(): want = other.forward_features(dino_input(x / 255, grid))[:, 1:]
    got = encoder(x, grid)
    assert encoder.features == 24 and got.shape == (2, grid[0] * grid[1], 24) and not got.requires_grad
    assert torch.allclose(got, want, atol=1e-5) and encoder.label.startswith("dinov2-b ")


def test_every_kind_of_file(weights, small, tmp_path, monkeypatch):
    net, path = weights
    torch.save(net.state_dict() | {"mask_token": torch.zeros(1, 24)}, tmp_path / "meta.pth")  # Meta's layout
    meta, ours = load_encoder("dinov2-b", tmp_path / "meta.pth"), load_encoder("dinov2-b", path)
    assert torch.equal(meta(pixels(64, 64), (4, 4)), ours(pixels(64, 64), (4, 4)))
    for name in ("dinov2-b", "efficientnet-lite0"):
        assert "nowhere" in complaint(load_encoder, name, tmp_path / "nowhere", error=FileNotFoundError)
        (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
        (tmp_path / "junk").write_bytes(b"no weights")
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        for wrong in ("cut.safetensors", "junk", "other.safetensors"):
            assert wrong in complaint(load_encoder, name, tmp_path / wrong)

    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path / "exploded",))
    torch.save({"state": Bomb()}, tmp_path / "bomb.pth")
    for name in ("dinov2-b", "efficientnet-lite0"):
        assert "bomb.pth" in complaint(load_encoder, name, tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_names_packages_network(weights, monkeypatch):
    text = complaint(load_encoder, "clip")
    assert "dinov2-b" in text and "efficientnet-lite0" in text
    def offline(*args, **kw): raise ConnectionError("no\nroute")
    monkeypatch.setattr(repa, "hf_hub_download", offline)
    assert "path" in complaint(load_encoder, "dinov2-b", error=OSError)
    for name, package in (("dinov2-b", "timm"), ("efficientnet-lite0", "efficientnet_lite_pytorch")):
        monkeypatch.setitem(sys.modules, package, None)
        assert "[repa]" in complaint(load_encoder, name, weights[1], error=ImportError)


def test_efficientnet():
    "Its map, through the network's own last layers, gives FID's features; a wider image gets a wider grid."
    net, run, features = repa.efficientnet(default_weights("efficientnet-lite0"))
    net.eval()
    x = pixels(64, 64)
    with torch.no_grad(): pooled = net._swish(net._bn1(net._conv_head(run(x, (7, 7))))).mean((2, 3))
    assert torch.allclose(pooled, load_extractor("efficientnet-lite0")(x)["features"], atol=1e-3, rtol=1e-3)
    encoder = load_encoder("efficientnet-lite0")
    assert encoder.label == load_extractor("efficientnet-lite0").label == "efficientnet-lite0 57934424"
    assert encoder(pixels(32, 64), (2, 4)).shape == (2, 8, features) == (2, 8, encoder.features)
