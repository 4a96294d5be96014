"The report as its users meet it: images drawn or given, references, reuse, comparisons, and bad input."
import json
import re
import shlex
import shutil
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
import deco
from conftest import run, two
from deco import evaluate as evaluation
from deco import sample as sampling
from deco import train as training
from deco.core import command_line, parse_settings, Parser
from deco.evaluate import cautions, check_evaluation, compare_reports, Evaluation, ImageFiles
from deco.metrics import Classifier


def evaluate(*argv) -> str: return run(evaluation, *argv)


def report(folder): return json.loads((folder / "report.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(Classifier(5).state_dict(), path)
    return ["--extractor", "classifier", "--extractor-weights", path]


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    assert run(training, "--smoke", "--data", photos, "--out", out) == ""
    return out


@pytest.fixture(scope="module")
def quick(weights): return [*weights, "--num-images", 12, "--steps", 2, "--batch-size", 5]


@pytest.fixture(scope="module")
def done(trained, quick):
    "An evaluated run, in the default folder."
    assert evaluate(trained, *quick) == ""
    return trained


def test_report(done):
    out = done / "evaluation"
    r = report(out)
    files = {"report.json", "report.md", "grid.png", "spectra.png", "reference.safetensors", "samples"}
    assert {p.name for p in out.iterdir()} == files
    pictures = list((out / "samples").glob("*.png"))
    assert len(pictures) == r["n"] == r["drawn_now"] == r["settings"]["num"] == 12
    assert r["settings"]["seed"] == 0 and r["settings"]["steps"] == 2
    assert r["settings"]["classes"] == ["blue", "red"] and r["reference"]["n"] == 16
    size = deco.load(done)[1]["size"]
    assert r["reference"]["fingerprint"].startswith(f"16x{size}x{size}-")
    assert r["extractor"].startswith("classifier ")
    assert all(np.isfinite(r["metrics"][k]) for k in evaluation.METRICS)
    assert np.shape(r["spectra"]["samples"]) == (2, 3, 64)
    assert set(r["seconds"]) >= {"drawing", "features of the samples", "features of the reference", "metrics"}
    assert 100 < r["peak_memory_mb"] < 10_000
    assert any("12 generated images for 128 features" in n for n in r["notes"])
    assert r["versions"]["torch"] == torch.__version__
    page = (out / "report.md").read_text("utf-8")
    for key in ("seed", "guidance", "interval", "ema_decay", "labels", "steps", "solver", "extractor",
                "reference", "N"):
        assert f"\n| {key} | " in page, key
    assert f"| {r['metrics']['fid']:.4g} |" in page
    assert r["command"] in page and "![samples](grid.png)" in page
    assert all(line.count("|") == 3 for line in page.splitlines() if line.startswith("|"))


def test_same_command_reuses_the_images(done, quick):
    folder = done / "evaluation"
    before = report(folder)
    times = {p: p.stat().st_mtime_ns for p in (folder / "samples").glob("*.png")}
    assert evaluate(done, *quick) == ""
    after = report(folder)
    assert after["drawn_now"] == 0 and after["metrics"] == before["metrics"]
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert "holds images made with guidance 3.0 (now 2.0)" in evaluate(done, *quick, "--guidance", 2)
    (folder / "samples" / "000007.png").unlink()
    assert evaluate(done, *quick) == "" and report(folder)["metrics"] == before["metrics"]


def test_command_gives_the_same_number(done, tmp_path):
    words = shlex.split(report(done / "evaluation")["command"])[3:]
    assert evaluate(*words, "--out", tmp_path) == ""
    assert report(tmp_path)["metrics"] == report(done / "evaluation")["metrics"]


def test_one_call_is_the_command(done, quick, weights, tmp_path):
    "The report of a call is that of the command, and its `command` gives it again, in any folder."
    cfg = Evaluation(run=str(done), extractor="classifier", extractor_weights=str(weights[-1]), num_images=12,
                     steps=2, batch_size=5, classes="red,blue", interval=[0.25, 1.0],
                     out=str(tmp_path / "a b"))
    a = evaluation.evaluate(cfg)
    assert a == report(tmp_path / "a b") and a["settings"]["interval"] == [0.25, 1.0]
    words = shlex.split(a["command"])
    assert words[:4] == ["python", "-m", "deco.evaluate", str(done)] and "--seed" not in words
    assert parse_settings(Parser("evaluate"), Evaluation, words[3:]) == cfg
    assert evaluate(*words[3:], "--out", tmp_path / "b") == ""
    b = report(tmp_path / "b")
    assert [a[k] for k in ("metrics", "settings", "spectra", "notes")] == \
        [b[k] for k in ("metrics", "settings", "spectra", "notes")]
    assert evaluate(*words[3:]) == "" and report(tmp_path / "a b")["drawn_now"] == 0
    page = compare_reports(tmp_path / "a b", tmp_path / "b", tmp_path).read_text("utf-8")
    assert page.count("| seed |") == 1


@pytest.mark.parametrize("settings", [
    dict(run="x", prompt=["a red cup", "two 'clocks'"], negative="no cat", num_images=9),
    dict(run="a run", interval=(0.1, 0.9), shift=2.0, ema=0.999, weak="y", classes="1,2"),
    dict(samples="a.npz", reference="b c.npz", out="z"), dict(compare=["a", "b"])])
def test_settings_as_a_command(settings):
    cfg = Evaluation(**settings)
    check_evaluation(cfg)
    words = shlex.split(command_line("evaluate", cfg))[3:]
    assert parse_settings(Parser("evaluate"), Evaluation, words) == cfg


def test_ignored_settings_are_an_error():
    "From Python as on the command line; a setting at its default, however it is written, is none."
    two = ["a", "b"]
    for settings, text in (
            (dict(compare=two, run="x", seed=3), "--compare reads reports: leave out run, --seed"),
            (dict(samples="a", guidance=2.0), "--samples takes images as they are: leave out --guidance"),
            (dict(run="x", num_images=3), "--num-images must be a whole number from 4 to 10000000, not 3"),
            (dict(compare=two), "call compare_reports"), ({}, "give the folder of a run")):
        with pytest.raises(ValueError, match=text): evaluation.evaluate(Evaluation(**settings))
    check_evaluation(Evaluation(samples="a", interval=[0, 1], guidance=3))


def test_given_images(done, weights, tmp_path):
    "The same images as a folder, and as an .npz file, whose settings deco.sample left beside it."
    size, drawn = deco.load(done)[1]["size"], report(done / "evaluation")
    given = [done, "--samples", done / "evaluation" / "samples", *weights, "--batch-size", 5]
    assert evaluate(*given, "--out", tmp_path / "a") == ""
    a = report(tmp_path / "a")
    assert a["metrics"] == drawn["metrics"] and a["drawn_now"] == 0
    assert a["settings"]["seed"] == 0 and a["settings"]["guidance"] == 3
    flags = ["--num-images", 12, "--steps", 2, "--batch-size", 5]
    assert run(sampling, done, *flags, "--out", tmp_path / "b.npz") == ""
    (tmp_path / "real").mkdir()
    for i in range(8):                                                       # cropped on the way
        image = Image.new("RGB", (3 * size + i, 2 * size), (30 * i, 90, 10))
        image.save(tmp_path / "real" / f"{i}.jpg")
    given = ["--samples", tmp_path / "b.npz", "--reference", tmp_path / "real", *weights]
    assert evaluate(*given, "--out", tmp_path / "b") == ""
    b = report(tmp_path / "b")
    assert b["settings"]["seed"] == 0 and b["n"] == 12 and b["reference"]["n"] == 8
    assert b["spectra"]["samples"] == drawn["spectra"]["samples"]
    (tmp_path / "b" / "samples.json").unlink()
    noise = np.random.default_rng(0).integers(256, size=(20, size, size, 3), dtype=np.uint8)
    np.savez(tmp_path / "c.npz", arr_0=noise)
    reference = ["--reference", tmp_path / "b" / "reference.safetensors"]
    assert evaluate("--samples", tmp_path / "c.npz", *reference, *weights, "--out", tmp_path / "c") == ""
    c = report(tmp_path / "c")
    assert c["reference"]["fingerprint"] == b["reference"]["fingerprint"]
    assert any("not known" in n for n in c["notes"])


def test_comparison(done, quick, weights, tmp_path):
    assert evaluate(done, *quick, "--guidance", 1, "--out", tmp_path / "plain") == ""
    assert evaluate("--compare", done, tmp_path / "plain" / "report.json", "--out", tmp_path / "both") == ""
    page = (tmp_path / "both" / "compare.md").read_text("utf-8")
    a, b = report(done / "evaluation"), report(tmp_path / "plain")
    assert "| guidance | 3 | 1 |" in page and f"| {b['metrics']['fid'] - a['metrics']['fid']:.4g} |" in page
    assert Image.open(tmp_path / "both" / "compare.png").width > 500
    different = page[page.index("## What differs"):page.index("## What is the same")]
    assert re.findall(r"^\| (\w+) ", different, re.M) == ["setting", "guidance"]
    for name, flags in (("N", ["--num-images", 13]), ("labels", ["--labels", "random"]),
                        ("classes", ["--classes", "red"])):
        assert evaluate(done, *quick, *flags, "--out", tmp_path / name) == ""
        assert f"differ in {name} (" in evaluate("--compare", done, tmp_path / name, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    for key, value in (("extractor", "inception 6726825d"),
                       ("reference", dict(name="other", n=16, fingerprint="16x16x16-00"))):
        (tmp_path / "edited.json").write_text(json.dumps(a | {key: value}), "utf-8")
        assert f"differ in {key} (" in evaluate("--compare", done, tmp_path / "edited.json")
    unknown = a | dict(settings=dict(samples="theirs.npz", size=a["settings"]["size"]))
    (tmp_path / "edited.json").write_text(json.dumps(unknown), "utf-8")
    assert evaluate("--compare", done, tmp_path / "edited.json", "--out", tmp_path / "odd") == ""
    assert "> Note: labels" in (tmp_path / "odd" / "compare.md").read_text("utf-8")
    (tmp_path / "edited.json").write_text("{}", "utf-8")
    assert "no report" in evaluate("--compare", done, tmp_path / "edited.json")
    assert "no report.json in" in evaluate("--compare", done, tmp_path / "nowhere")


def no_route(*args, **kwargs): raise OSError("no route")


def test_bad_input(done, quick, weights, tmp_path, monkeypatch):
    out, size = ["--out", tmp_path / "out"], deco.load(done)[1]["size"]
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((20, size, 2 * size, 3), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, size, size, 3), np.uint8))
    noise = np.random.default_rng(0).integers(256, size=(20, size, size, 3), dtype=np.uint8)
    np.savez(tmp_path / "good.npz", arr_0=noise)
    (tmp_path / "empty").mkdir()
    given = ["--samples", tmp_path / "good.npz", *weights]
    cases = {
        "nowhere": ["nowhere", *weights],
        "give the folder of a run": [],
        "--num-images must be a whole number from 4 to 10000000, not 3": [done, "--num-images", 3],
        "--batch-size": [done, *quick, "--batch-size", 0],
        "no reference": [done, *quick, "--reference", tmp_path / "nowhere.npz"],
        "has images of": [done, *quick, "--reference", tmp_path / "wide.npz"],
        "3 images: precision": [done, *quick, "--reference", tmp_path / "few.npz"],
        "no image in": [done, *quick, "--reference", tmp_path / "empty"],
        "--extractor-weights": [done, *quick[4:], "--extractor", "classifier"],
        "--ema 0.5": [done, *quick, "--ema", 0.5],
        "leave out --guidance": [done, *given, "--guidance", 2],
        "needs a run": given,
        "leave out --num-images, --labels": [*given, "--labels", "random", "--num-images", 9],
        "square, not": ["--samples", tmp_path / "wide.npz", *weights],
        "config.json": ["nowhere", *given],
        "no file of images": [done, "--samples", tmp_path / "nowhere.npz", *weights],
        "leave out run": ["x", "--compare", done, done],
    }
    for text, argv in cases.items(): assert text in evaluate(*argv, *out), text
    assert not (tmp_path / "out" / "samples").exists(), "nothing is drawn before all is in order"
    assert "interval must" in evaluate(done, *quick, "--interval", 1, 0, *out)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    assert "take efficientnet-lite0" in evaluate(done, "--num-images", 12, *out)      # the default: Inception
    Image.new("RGB", (size, size)).save(tmp_path / "empty" / "a.png")
    (tmp_path / "empty" / "b.png").write_bytes(b"junk")
    assert "b.png" in evaluate(done, "--samples", tmp_path / "empty", *weights, *out)
    Image.new("RGB", (size, size + 1)).save(tmp_path / "empty" / "b.png")
    assert "one size" in evaluate(done, "--samples", tmp_path / "empty", *weights, *out)


def test_class_shares():
    result = dict(notes=[], extractor="classifier", n=4)
    even, real = [0, 1, 0, 1], torch.tensor([0, 1] * 10)
    assert cautions(result, dict(seed=0), even, real) == []
    assert "50% of the images" in cautions(result, dict(seed=0), even, torch.zeros(10, dtype=torch.long))[0]
    assert "33% of the images" in cautions(result, dict(seed=0), [0, 1, 2], torch.tensor([0, 0, 1]))[0]
    alike = dict(seed=0, labels="data", classes=["a", "b"])
    few = torch.tensor([0] * 9 + [1])                               # a draw of four can't have these shares
    assert cautions(result, alike, even, few) == []
    assert "40%" in cautions(result, alike | dict(labels="random"), even, few)[0]
    assert "90%" in cautions(result, alike | dict(classes=["b"]), [1, 1], few)[0]    # one class of them


def test_the_encoder_trained_on_must_not_judge(done, quick, tmp_path):
    "A note where the run's repa is the extractor, by its name; none for another encoder."
    for name, expected in (("classifier", True), ("dinov2-b", False)):
        shutil.copytree(done, tmp_path / name, ignore=shutil.ignore_patterns("evaluation"))
        info = json.loads((done / "config.json").read_text("utf-8"))
        info["train"]["repa"] = name
        (tmp_path / name / "config.json").write_text(json.dumps(info), "utf-8")
        assert evaluate(tmp_path / name, *quick) == ""
        notes = report(tmp_path / name / "evaluation")["notes"]
        assert any("must not judge" in note for note in notes) == expected
    given = ["--samples", tmp_path / "classifier" / "evaluation" / "samples", *quick[:4]]
    assert evaluate(tmp_path / "classifier", *given, "--out", tmp_path / "given") == ""
    assert any("must not judge" in note for note in report(tmp_path / "given")["notes"])


def test_files_are_read_in_order_and_again(tmp_path):
    for i in range(130): Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    files = ImageFiles(sorted(tmp_path.glob("*.png")), 8)
    for _ in range(2): assert [int(v) for x in files for v in x[:, 0, 0, 0]] == list(range(130))


def test_several_processes(done, quick, tmp_path):
    "Two processes share the drawing; one process reports, and the number is the same."
    two("deco.evaluate", done, *quick, "--out", tmp_path)
    a, b = report(done / "evaluation"), report(tmp_path)
    assert b["versions"]["processes"] == 2 and b["drawn_now"] == 12
    assert b["metrics"]["fid"] == pytest.approx(a["metrics"]["fid"], rel=1e-3)
