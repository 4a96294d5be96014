"What strangers send and fingers slip to: nasty numbers, edited and broken files, folders that are not ours."
import contextlib
import json
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
import deco
import siege
from conftest import run
from deco import evaluate, hub, sample, train
from deco.core import cell, fenced, one_line, page, pick_device, read_json
from deco.demo import Guard
from deco.text import language_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory): return siege.make_run(tmp_path_factory.mktemp("siege"))


@pytest.mark.parametrize("group", ["numbers", "files"])
def test_siege(group, tmp_path):
    "A few cases of each group, always the same ones; tools/siege.py tries all."
    cases = list(siege.GROUPS[group](tmp_path, 0.015, 0, False))       # nothing trained, no large files
    wrong = [f"{what}: {problem}" for what, problem in cases if problem]
    assert len(cases) > 50 and not wrong, "\n".join(wrong)


def test_memory_is_bounded(trained, tmp_path):
    "A configuration of a few bytes takes no memory before its weights are looked at."
    if sys.platform == "win32": pytest.skip("no limit of memory here")
    import resource
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = 2**34
    with contextlib.suppress(OSError):
        size = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, before[1]))
    try: wrong = [case for case in siege.bombs(tmp_path, trained, 20) if case[1]]
    finally: resource.setrlimit(resource.RLIMIT_AS, before)
    assert not wrong


REFUSED = {"--depth": ("depth=-1", "depth must be a whole number from 1 to 1024, not -1"),
           "--heads": ("heads=0", "heads must be a whole number"),
           "--ratio": ("mlp_ratio=0", "mlp_ratio must be"),
           "--classes": ("num_classes=3", "num_classes: the data say it; leave it out"),
           "--text": ("text_depth=2", "text_depth is for a model of captions")}

@pytest.mark.parametrize("text, words", REFUSED.values())
def test_arguments_of_a_model(text, words):
    "What makes no sense, and what would be ignored."
    assert words in run(train, "--dry-run", "--model", "deco-tiny", "--model-args", text)


def test_devices():
    with pytest.raises(ValueError, match="--device meta is not to be had"): pick_device("meta")


# --- what is written for people

def test_nothing_is_obeyed(trained, tmp_path):
    "Names with escape codes, HTML, links and fences are shown and not obeyed, wherever they are written."
    name = "\x1b[31m<img src=x onerror=alert(1)>[x](javascript:alert(1))|`\n# head"
    info = read_json(trained / "config.json") | dict(classes=[name, "y" * 100_000], license=name)
    model, _ = deco.load(trained)
    deco.save(tmp_path, model, info)
    card = hub.card(model, info)
    line = sample.draw(sample.Sampling(run=str(tmp_path), num_images=1, steps=1, out=str(tmp_path / "x.png")))
    error = run(sample, tmp_path, "--classes", "zebra")
    for text in (card, line, error, page(name, [name], cell(name))): assert "\x1b" not in text
    for text in (card, page(name, [name], cell(name))):
        assert "<img" not in text and "\n# head" not in text and "[x](" not in text.replace("\\[x\\](", "")
    assert len(error) < 3000 and "\n" not in line
    assert fenced("a\n```\nb").split("\n")[0] == "````" and one_line("x" * 9000, 100).count("x") == 100


# --- language models

def test_a_language_model_is_never_fetched_or_run(tmp_path, monkeypatch):
    "For a stranger's config.json the network is not asked, and code of a model's folder not run."
    with pytest.raises(FileNotFoundError, match="fetch it: hf download nobody/nothing"):
        language_model("nobody/nothing", "cpu")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import PretrainedConfig as C"
    (tmp_path / "code.py").write_text(code, "utf-8")
    config = dict(model_type="x", auto_map=dict(AutoConfig="code.C"))
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asks"))
    with pytest.raises(FileNotFoundError, match="no language model"): language_model(str(tmp_path), "cpu")
    assert not ran.exists()
    config = dict(model_type="bert", hidden_size=8, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(FileNotFoundError, match="no language model"): language_model(str(tmp_path), "cpu")


def test_text_may_not_switch_anything_on(trained, tmp_path):
    info = read_json(trained.parent / "words" / "config.json")
    info["text"]["download"] = True
    deco.save(tmp_path, deco.load(trained.parent / "words")[0], info)
    assert "text must be an object with the name" in run(sample, tmp_path, "--device", "cpu")


# --- where pictures go

def test_foreign_pictures(trained, tmp_path):
    "They are neither overwritten nor passed off as samples."
    for out in ("six", "six.npz"):
        (tmp_path / "six").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), "yellow").save(tmp_path / "six" / "000000.png")
        command = [trained, "--num-images", 2, "--steps", 1, "--device", "cpu", "--out", tmp_path / out]
        assert "000000.png is not of deco.sample" in run(sample, *command)
        assert not (tmp_path / "six" / "samples.json").exists() and not (tmp_path / "six.npz").exists()
    mine = [*command[:-1], tmp_path / "mine.npz"]
    assert run(sample, *mine) == ""
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "000001.png")
    assert "000001.png is no picture of 16 x 16 pixels: remove it" in run(sample, *mine)
    (tmp_path / "file").write_text("x", "utf-8")
    assert "is a file, not a folder" in run(sample, *command[:-1], tmp_path / "file")


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp"])
def test_a_grid_replaces_grids_alone(name, trained, tmp_path):
    Image.new("RGB", (16, 16), "yellow").save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    command = [trained, "--num-images", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / name]
    assert f"{name} is there, and not by deco.sample" in run(sample, *command)
    assert (tmp_path / name).read_bytes() == before
    (tmp_path / name).unlink()
    assert run(sample, *command) == "" and run(sample, *command, "--seed", 1) == ""
    with Image.open(tmp_path / name) as image: assert image.getexif()[305] == "deco.sample"


KINDS = [("x.png", "PNG"), ("x.PNG", "PNG"), ("x.jpg", "JPEG"), ("x.webp", "WEBP")]

@pytest.mark.parametrize("name, kind", KINDS)
def test_grids_are_what_their_names_say(name, kind, trained, tmp_path):
    run(sample, trained, "--num-images", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / name)
    with Image.open(tmp_path / name) as image: assert image.format == kind


OTHERS = [("x.npy", "give a .png"), ("x.gif", "give a .png"), ("", "--out must be")]

@pytest.mark.parametrize("name, words", OTHERS)
def test_other_kinds_of_files(name, words, trained, tmp_path):
    assert words in run(sample, trained, "--num-images", 1, "--out", tmp_path / name if name else "")


def test_a_grid_too_large(trained, tmp_path):
    command = [trained, "--device", "cpu", "--size", 8192, 8192, "--out", tmp_path / "x.png"]
    assert "the grid would have" in run(sample, *command)


# --- numbers that are none

def test_weights_of_an_extractor(tmp_path):
    from deco.metrics import Classifier, load_extractor
    from safetensors.torch import save_file
    state = Classifier(4).state_dict()
    state["head.1.bias"][0] = torch.nan
    save_file(state, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="c.safetensors: the weights head.1.bias hold NaN"):
        load_extractor("classifier", tmp_path / "c.safetensors")


def test_evaluation_of_a_diverged_run(trained, tmp_path):
    "It is found out before the reference is measured."
    model, info = deco.load(trained)
    with torch.no_grad(): model.blocks[0].attn.qkv.weight[0, 0] = torch.nan
    deco.save(tmp_path, model, info)
    error = run(evaluate, tmp_path, "--num-images", 4, "--extractor", "efficientnet-lite0", "--device", "cpu")
    assert "model.safetensors: the weights blocks.0.attn.qkv.weight hold NaN" in error
    with pytest.raises(ValueError, match="blocks.0.attn.qkv.weight hold NaN"):
        deco.sample_images(model, [0], 16, steps=1)


@pytest.mark.parametrize("part, change", [
    ("sigma", lambda x: -x), ("mu", lambda x: x * np.nan), ("sigma", lambda x: x[:-1]),
    ("mu_s", lambda x: x[:-1])])
def test_statistics_that_cannot_be(part, change, tmp_path):
    "An ADM reference of another shape, or whose numbers can't be those of any images."
    arrays = dict(mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3))
    extractor = deco.metrics.Extractor("x", None)
    np.savez(tmp_path / "right.npz", **arrays)
    assert deco.metrics.reference_statistics(tmp_path / "right.npz", extractor)["mu"].shape == (4,)
    np.savez(tmp_path / "wrong.npz", **arrays | {part: change(arrays[part])})
    with pytest.raises(ValueError, match="is not what was measured: make it anew"):
        deco.metrics.reference_statistics(tmp_path / "wrong.npz", extractor)


# --- the page

REQUESTS = [(dict(host="127.0.0.1:1"), None), (dict(host="localhost:1"), None), (dict(host="[::1]:1"), None),
            (dict(host="lab.example"), None), (dict(host="evil.example"), 403), (dict(), 403),
            (dict(host="localhost:1", origin="http://localhost:1"), None),
            (dict(host="localhost:1", origin="https://lab.example"), None),
            (dict(host="localhost:1", origin="http://localhost:2"), 403),
            (dict(host="localhost:1", origin="http://evil.example"), 403),
            (dict(host="localhost:1", origin="null"), 403), (dict(host="a", path="/gradio_api/upload"), 403),
            (dict(host="localhost", path="/gradio_api/upload/"), 403),
            ({"host": "localhost", "content-length": "1000000"}, 413),
            ({"host": "localhost", "content-length": "-1"}, 413),
            ({"host": "localhost", "transfer-encoding": "chunked"}, 411)]

@pytest.mark.parametrize("headers, status", REQUESTS)
def test_the_guard_of_the_page(headers, status):
    headers = dict(headers)
    answer = Guard(None, ["lab.example"]).refusal(headers.pop("path", "/gradio_api/queue/join"), headers)
    assert (answer and answer[0]) == status
