"Models as they are published: save_pretrained, from_pretrained, the card, broken folders and hubs."
import errno
import hashlib
import json
from pathlib import Path
import pytest
import torch
import yaml
from PIL import Image
import deco
from conftest import run
from deco import hub, sample
from deco.data import to_tensor
from deco.core import parameter_count, read_tensors
from deco.model import Baseline, create, DeCo, PixNerd, sample_images
from deco.official import load_official

GOLDEN = Path(__file__).parent / "golden"
INFO = dict(size=16, classes=["cats", "dogs | wolves"], images_seen=1234, license="mit",
            train=dict(data="/home/someone/photos", ema_decay=0.995, guidance=2.0, steps=3),
            metrics=dict(fid=12.345678, n=64))


def tiny(kind: str = "DeCo"):
    "A small model all of whose parameters count."
    variants = dict(DeCo=dict(name="deco-tiny"), Baseline=dict(name="dit-toy", width=64, depth=2, heads=2),
                    PixNerd=dict(name="dit-tiny", field_width=8))
    model = create(num_classes=2, **variants[kind])
    for p in model.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def outputs(model):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): return model(x, torch.tensor([0.3, 0.8]), torch.tensor([0, 2]))


def files(folder: Path) -> dict: return {p.name: p.read_bytes() for p in folder.iterdir()}


def header(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text("utf-8").split("---\n")[1])


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path / "model", INFO)
    return tmp_path / "model"


# --- there and back

@pytest.mark.parametrize("cls", [DeCo, Baseline, PixNerd])
def test_round_trip(cls, tmp_path):
    model = tiny(cls.__name__)
    assert type(model) is cls and isinstance(model, deco.DiT)
    assert model.save_pretrained(tmp_path / "a" / "b", INFO) is None
    again = cls.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(outputs(again), outputs(model)) and not again.training and again.info == INFO
    assert set(files(tmp_path / "a" / "b")) == {"model.safetensors", "config.json", "README.md"}
    plain, info = deco.load(tmp_path / "a" / "b")                   # the same folder for all that reads runs
    assert torch.equal(outputs(plain), outputs(model)) and info["classes"] == INFO["classes"]
    again.save_pretrained(tmp_path / "c")                             # what it knows of itself goes on
    assert files(tmp_path / "c") == files(tmp_path / "a" / "b")


def test_official(tmp_path):
    "The authors' file, converted: the EMA and its images bit for bit."
    model = load_official(GOLDEN / "lightning_tiny.ckpt")
    model.save_pretrained(tmp_path, dict(size=32))
    expected = hub.load(tmp_path)[0]
    golden = read_tensors(GOLDEN / "lightning_tiny.safetensors")
    with torch.no_grad(): v = expected(golden["x"], golden["t"], golden["y"])
    assert (v - golden["v_ema"]).abs().max() < 1e-4
    settings = dict(steps=5, guidance=3.0, interval=(0.1, 1.0), seed=2)
    a, b = (sample_images(m, [3, 10], 32, **settings) for m in (DeCo.from_pretrained(tmp_path), model))
    assert torch.equal(a, b)


def test_newer_model_of_an_older_info(saved):
    "An info of another model's config.json, \"model\" and all: the model's own configuration is written."
    other = create("deco-tiny", num_classes=5)
    info = json.loads((saved / "config.json").read_text("utf-8")) | dict(classes=list("abcde"))
    other.save_pretrained(saved, info)
    assert DeCo.from_pretrained(saved).num_classes == 5


# --- the card

def test_card(saved):
    text, model = (saved / "README.md").read_text("utf-8"), tiny()
    tags = ["class-conditional", "flow-matching", "model_hub_mixin", "pixel-diffusion"]
    assert header(saved) == dict(library_name="deco", license="mit", tags=tags)
    config = [f"| {k} | {v:g} |" for k, v in model.config.items() if not isinstance(v, (bool, str))]
    for part in (f"{parameter_count(model):,} parameters", "arxiv.org/abs/2511.19365", r"dogs \| wolves",
                 "Images of 16 pixels", "label 2 stands for none", "| ema_decay | 0.995 |",
                 "| images_seen | 1234 |", "| fid | 12.35 |", "| n | 64 |", "| data | photos |", *config):
        assert part in text, part
    assert "/home" not in text and "OpenMoji" not in text


@pytest.mark.parametrize("kind, title", [
    ("DeCo", "the DiT and pixel decoder"), ("Baseline", "the baseline, a DiT without decoder,"),
    ("PixNerd", "PixNerd (arXiv 2507.23268), a DiT whose tokens make small MLPs, built beside the models")])
def test_card_says_what_kind_of_model_it_is(kind, title):
    text = hub.card(tiny(kind), {})
    assert f"# {kind}, " in text and f"deco.model.{kind}.from_pretrained" in text
    assert f"A diffusion model that draws images in pixels, given a class: {title} of\n*DeCo: " in text


def test_card_says_what_is_unknown(tmp_path):
    tiny().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "Not recorded." in text and "None were measured." in text and "license" not in header(tmp_path)
    found = hub.card(tiny(), dict(source=str(tmp_path / "pictures"), train=dict(data="pictures")))
    assert "| source | pictures |" in found and str(tmp_path) not in found      # nor whose home it is
    assert "CC BY-SA 4.0" in hub.card(tiny(), dict(train=dict(data="openmoji")))
    assert "| fid \\| x | 1 2 |" in hub.card(tiny(), dict(metrics={"fid | x": "1\n2"}))


@pytest.mark.parametrize("kind", ["DeCo", "Baseline", "PixNerd"])
def test_lines_of_the_card_run(kind, tmp_path, monkeypatch):
    sampling = dict(guidance=3.0, steps=2, interval=[0.1, 1.0])
    tiny(kind).save_pretrained(tmp_path, INFO | dict(sampling=sampling))
    lines = (tmp_path / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    assert len(lines.splitlines()) == 4 and "interval=(0.1, 1.0)" in lines
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert (tmp_path / "grid.png").stat().st_size > 100


def test_numbers_of_a_report(saved):
    "report.json of a run becomes the card's numbers, where config.json has none."
    digest = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()[:16]
    settings = dict(weights=digest, guidance=2.0)
    report = dict(metrics=dict(fid=3.5), n=64, extractor="e 1", reference=dict(name="data"), spectra={},
                  settings=settings, notes=["64 images are too few"])
    (saved / "evaluation").mkdir()
    path = saved / "evaluation" / "report.json"
    path.write_text(json.dumps(report), "utf-8")
    assert DeCo.from_pretrained(saved).info["metrics"] == INFO["metrics"]
    DeCo.from_pretrained(saved).save_pretrained(saved, {})                                # the same weights
    numbers = dict(fid=3.5, images=64, extractor="e 1", reference="data", guidance=2.0)
    again = DeCo.from_pretrained(saved)
    assert again.info["metrics"] == numbers
    again.save_pretrained(saved / "published")
    assert "Note: 64 images are too few." in (saved / "published" / "README.md").read_text("utf-8")
    tiny().save_pretrained(saved, {})                                                     # others
    with pytest.warns(UserWarning, match="not known to be about these weights"):
        assert "metrics" not in DeCo.from_pretrained(saved).info
    incomplete = '{"metrics": 3, "n": 1, "extractor": "", "reference": {"name": ""}, "settings": {}}'
    for text in ("{", "{}", incomplete):
        path.write_text(text, "utf-8")
        with pytest.raises(ValueError, match="report.json"): DeCo.from_pretrained(saved)


def test_card_is_new_unless_written_by_hand(saved):
    tiny().save_pretrained(saved, INFO | dict(metrics=dict(fid=1.5)))
    assert "| fid | 1.5 |" in (saved / "README.md").read_text("utf-8")
    (saved / "README.md").write_text("mine", "utf-8")
    with pytest.warns(UserWarning, match="README.md is no card"): tiny().save_pretrained(saved, INFO)
    assert (saved / "README.md").read_text("utf-8") == "mine" and DeCo.from_pretrained(saved).info == INFO


# --- failures

@pytest.mark.parametrize("where", ["deco.model.save_file", "json.dumps", "huggingface_hub.ModelCard.save",
                                   "os.replace"])
def test_full_disk_keeps_the_folder(where, saved, monkeypatch):
    before = files(saved)
    def full(*args, **kw): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match=r"cannot save into .*model \(.*No space left") as e:
        tiny().save_pretrained(saved, dict(size=8))
    assert "\n" not in str(e.value) and ".new-" not in str(e.value) and files(saved) == before


def test_bad_input(saved, tmp_path):
    model, before = tiny(), files(saved)
    read = DeCo.from_pretrained
    cases = [(lambda: model.save_pretrained(saved, dict(fid=torch.ones(1))), ValueError, "JSON"),
             (lambda: model.save_pretrained(saved, infos=1), ValueError, "infos"),
             (lambda: model.save_pretrained(saved / "config.json"), OSError, "config.json"),
             (lambda: read(saved / "model.safetensors"), ValueError, "is a file"),
             (lambda: Baseline.from_pretrained(saved), ValueError, "DeCo.from_pretrained"),
             (lambda: read(tmp_path / "none"), OSError, "no folder"),
             (lambda: read(tmp_path), FileNotFoundError, "no config.json")]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words) as e: call()
        assert "\n" not in str(e.value)
    assert files(saved) == before


def test_foreign_folders(saved):
    "Another library's config.json, broken ones, missing and foreign weights: the file is named."
    whole = files(saved)
    for text in ('{"model_type": "bert"}', '{"model": {"width": "wide"}}', "[1]", "{"):
        (saved / "config.json").write_text(text, "utf-8")
        with pytest.raises(ValueError, match="config.json"): DeCo.from_pretrained(saved)
    (saved / "config.json").write_bytes(whole["config.json"])
    (saved / "model.safetensors").write_bytes(whole["model.safetensors"][:5000])
    with pytest.raises(ValueError, match="model.safetensors is not a whole"): DeCo.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"): DeCo.from_pretrained(saved)


def test_wrong_keys_are_listed(saved):
    path, model = saved / "model.safetensors", tiny()
    state = {k.replace("blocks.1.attn.proj", "blocks.1.attn.out"): v for k, v in model.state_dict().items()}
    state["head.linear.bias"] = torch.zeros(4)
    deco.model.save_file(state, path)
    with pytest.raises(ValueError) as e: DeCo.from_pretrained(saved)
    for part in (str(path), "missing blocks.1.attn.proj.weight", "unexpected blocks.1.attn.out.bias",
                 "head.linear.bias is (4,), not (3,)"):
        assert part in str(e.value)


# --- the hub, which is not asked

def test_hub_id(saved, monkeypatch, tmp_path):
    calls = []
    def serve(repo_id, **given):
        calls.append((repo_id, given))
        return str(saved)
    monkeypatch.setattr(hub, "snapshot_download", serve)
    again = DeCo.from_pretrained("owner/model", revision="v1", token=False)
    assert torch.equal(outputs(again), outputs(DeCo.from_pretrained(saved))) and again.info == INFO
    assert calls == [("owner/model", dict(allow_patterns=hub._FILES, revision="v1", token=False))]
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    complaint = "zehongma/DeCo .*no config.json and no model.safetensors.*load_official"
    with pytest.raises(FileNotFoundError, match=complaint):
        DeCo.from_pretrained("zehongma/DeCo")


def test_hub_errors(monkeypatch, tmp_path):
    "The real client with its network off; an unknown repository; what is no id; what is no argument."
    with pytest.raises(OSError, match="no folder owner/model, and the hub gives none") as e:
        DeCo.from_pretrained("owner/model", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(e.value)
    for name in ("/nowhere/at/all", "./nowhere", "a/b/c"):
        with pytest.raises(OSError, match=f"no folder {name}, and the hub gives none"):
            DeCo.from_pretrained(name)
    with pytest.raises(TypeError, match="revison"): DeCo.from_pretrained("owner/model", revison="v1")
    for error in (TimeoutError(), RuntimeError("404\nmore")):       # an empty message, and one of many lines
        def unknown(*a, **k): raise error
        monkeypatch.setattr(hub, "snapshot_download", unknown)
        with pytest.raises(OSError, match=r"owner/model.*\((TimeoutError|404)\): check the name"):
            DeCo.from_pretrained("owner/model")


def test_upload(saved, monkeypatch, tmp_path):
    "push_to_hub uploads the three files after they are saved; where it fails, they still are."
    import huggingface_hub.hub_mixin as mixin
    uploaded = {}
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **kw): return type("Url", (), dict(repo_id=repo_id))
        def upload_folder(self, repo_id, folder_path, **kw):
            uploaded[repo_id] = files(Path(folder_path))
            return "https://hub/commit"
    monkeypatch.setattr(mixin, "HfApi", Api)
    address = tiny().save_pretrained(tmp_path / "x", INFO, push_to_hub=True, repo_id="owner/x")
    assert address == "https://hub/commit"
    assert uploaded == {"owner/x": files(tmp_path / "x")}
    assert set(files(tmp_path / "x")) == {"model.safetensors", "config.json", "README.md"}
    def broken(self, *a, **k): raise RuntimeError("401: no token\nsecond line")
    monkeypatch.setattr(Api, "create_repo", broken)
    with pytest.raises(OSError, match="y is saved, but the hub did not take owner/y .401: no token.") as e:
        tiny().save_pretrained(tmp_path / "y", push_to_hub=True, repo_id="owner/y")
    assert "\n" not in str(e.value) and (tmp_path / "y" / "config.json").exists()


@pytest.mark.parametrize("name", ["cifar10-mini", "cifar10-toy", "openmoji-64", "openmoji-mini",
                                  "openmoji-toy"])
def test_models_that_come_with_the_package(name, tmp_path, monkeypatch):
    "They load by name, from any folder, with their report; a folder of that name goes first."
    monkeypatch.chdir(tmp_path)
    model = deco.DeCo.from_pretrained(name)
    folder = Path(deco.__file__).parent / "weights" / name
    assert (folder / "model.safetensors").stat().st_size < 8e6 and len(model.info["classes"]) == 10
    metrics = model.info["metrics"]                                     # the report is about these weights
    assert metrics["images"] >= 1000 and metrics["fid"] > 0
    assert deco.sample_images(model, [0, 10], 32, steps=2).isfinite().all()
    assert run(sample, name, "--num-images", 2, "--steps", 2, "--out", "a.png") == ""
    assert Path("a.png").exists()
    (tmp_path / name / "evaluation").mkdir(parents=True)                      # what deco.evaluate leaves
    assert torch.equal(deco.load(name)[0].patch_embed.weight, model.patch_embed.weight)
    (tmp_path / name / "config.json").write_text("{}", "utf-8")
    with pytest.raises(FileNotFoundError, match="model.safetensors"): deco.DeCo.from_pretrained(name)
    for outside in ("..", ".", "", "weights"):
        with pytest.raises(OSError): deco.load(outside)


@pytest.mark.parametrize("name, thing", [("scenes-toy", "a photo of a {} circle"),
                                         ("openmoji-text-toy", "{} heart")])
def test_models_of_prompts_that_come_with_the_package(name, thing, tmp_path, monkeypatch):
    "By name, on the command line: asked for in red, it is red, in blue blue. (No emoji is called red heart.)"
    monkeypatch.chdir(tmp_path)
    flags = ("--num-images", 4, "--steps", 12, "--solver", "adams")
    for colour, channel in (("red", 0), ("blue", 2)):
        assert run(sample, name, "--prompt", thing.format(colour), *flags, "--out", colour) == ""
        x = torch.stack([to_tensor(Image.open(p)) for p in sorted(Path(colour).glob("*.png"))])
        ahead = x[:, channel] - x[:, [c for c in (0, 2) if c != channel]].amax(1)       # of the other channel
        assert ((ahead > 0.5).float().mean((1, 2)) > 0.03).sum() >= 3
        assert not (ahead < -0.5).float().mean() > 0.01
    assert (Path(deco.__file__).parent / "weights" / name / "model.safetensors").stat().st_size < 4e6


def test_a_model_of_prompts(tmp_path):
    "Published and taken up again, it knows its language model; the card's code is about prompts."
    model = deco.create("deco-tiny", text_width=384, text_length=16)
    info = dict(text=dict(name="minilm", length=16), prompts=["red heart", "sun"], size=16)
    model.save_pretrained(tmp_path, info)
    card, again = (tmp_path / "README.md").read_text("utf-8"), deco.DeCo.from_pretrained(tmp_path)
    assert "text-to-image" in card and "class-conditional" not in card
    assert "sample_prompts" in card and "minilm" in card
    encoder = deco.TextEncoder(**again.info["text"])
    images = deco.sample_prompts(again, encoder, again.info["prompts"], 16, steps=1, guidance=2.0)
    assert images.shape == (2, 3, 16, 16)
