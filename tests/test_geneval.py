"The layouts of GenEval and DPG-Bench, read as their programs read them."
import copy
import json
import os
import re
import shlex
import pytest
import torch
from PIL import Image
import deco
from conftest import run, two
from deco import geneval
from deco.core import command_line
from deco.geneval import Export, export, problems, read_items, write_item

LINES = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}],
          "prompt": "a photo of a bench"},
         {"tag": "counting", "include": [{"class": "cow", "count": 3}],
          "exclude": [{"class": "cow", "count": 4}], "prompt": "a photo of three cows"}]
TEXTS = {"localnarratives10": "A long prompt.\n", "partiprompts7": "Another, über alles.\n"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A model of prompts, with random weights, as a run leaves it."
    folder = tmp_path_factory.mktemp("model")
    model = deco.create("deco-tiny", text_width=384, text_length=16, text_depth=1)
    for p in model.head.parameters(): torch.nn.init.normal_(p, std=0.1)
    text = dict(name="minilm", length=16)
    deco.save(folder, model, dict(size=16, text=text, prompts=["x"], images_seen=0))
    return folder


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), "utf-8")
    (tmp_path / "d").mkdir()
    for name, text in TEXTS.items(): (tmp_path / "d" / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def as_geneval(root):
    "What evaluate_images.py takes: folders named by digits, json.load of metadata.jsonl, samples \\d+\\.png."
    sizes = {}
    for name in os.listdir(root):
        if not (root / name).is_dir() or not name.isdigit(): continue
        with open(root / name / "metadata.jsonl", encoding="utf-8") as f: metadata = json.load(f)
        samples = root / name / "samples"
        pictures = [p for p in os.listdir(samples) if re.match(r"\d+\.png", p)]
        sizes[metadata["prompt"]] = [Image.open(samples / p).size for p in pictures]
    return sizes


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in (root / "images").rglob("*") if p.is_file()}


def test_geneval(model, prompts):
    command = [model, "--prompts", prompts / "g.jsonl", "--out", prompts / "out", "--steps", 2, "--seed", 5]
    assert run(geneval, *command) == ""
    assert as_geneval(prompts / "out" / "images") == {line["prompt"]: [(16, 16)] * 4 for line in LINES}
    files = {p: p.read_bytes() for p in (prompts / "out" / "images").rglob("*.png")}
    assert len(set(files.values())) == 8                                        # no noise is used twice
    victim = sorted(files)[5]
    victim.unlink()
    assert "is missing" in run(geneval, *command, "--check")
    assert run(geneval, *command) == "" and victim.read_bytes() == files[victim]
    assert "seed 5 (now 6)" in run(geneval, *command[:-1], 6)
    assert run(geneval, *command, "--check") == ""
    for ignored in (["--num-images", 8], ["--prompt", "x"], ["--labels", "random"]):
        assert ignored[0] in run(geneval, *command, *ignored)
    settings = json.loads((prompts / "out" / "samples.json").read_text("utf-8"))
    assert settings["classes"] == [line["prompt"] for line in LINES] and settings["num"] == 1


def test_one_call_is_the_command(model, prompts, capsys):
    cfg = Export(run=str(model), prompts=str(prompts / "g.jsonl"), out=str(prompts / "one"), steps=2,
                 per_prompt=2)
    before = copy.copy(cfg)
    line = export(cfg)
    assert cfg == before
    assert line.startswith(f"{prompts / 'one' / 'images'}: 2 prompts, 2 images of 16 pixels")
    words = shlex.split(command_line("geneval", cfg))[3:]
    assert run(geneval, *words) == "" and capsys.readouterr().out.strip() == line
    assert run(geneval, *words, "--out", prompts / "two") == ""
    assert contents(prompts / "one") == contents(prompts / "two")


def test_dpg(model, prompts):
    command = [model, "--prompts", prompts / "d", "--out", prompts / "out", "--steps", 2]
    assert run(geneval, *command) == ""
    root = prompts / "out" / "images"
    sizes = {p: Image.open(root / p).size for p in os.listdir(root)}            # every file is read
    assert sizes == {f"{name}.png": (32, 32) for name in TEXTS}
    assert "--per-prompt 3" in run(geneval, *command, "--per-prompt", 3)


def test_ranks_share_the_prompts(model, prompts):
    "Two processes make the files that one makes."
    alone, both = prompts / "one", prompts / "two"
    command = [model, "--prompts", prompts / "g.jsonl", "--steps", 2]
    assert run(geneval, *command, "--out", alone) == ""
    two("deco.geneval", *command, "--out", both)
    assert contents(alone) == contents(both)


def test_problems(prompts):
    items, root = read_items(prompts / "g.jsonl"), prompts / "r"
    for item in items: write_item(root, item, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert problems(root, items, 2, 8) == []
    assert len(problems(root, items, 3, 8)) == 2 and len(problems(root, items, 2, 9)) == 4
    (root / "stray.png").write_bytes(b"")
    (root / "00000" / "metadata.jsonl").write_text("{}", "utf-8")
    (root / "00001" / "samples" / "00001.png").write_bytes(b"\x89PNG")
    text = " ".join(problems(root, items, 2, 8))
    assert "stray.png does not belong" in text
    assert "is not the metadata" in text and "no whole picture" in text


BROKEN = ["a photo", '{"tag": "x"}', '{"prompt": "", "tag": "x"}', '{"prompt": 5, "tag": "x"}', "[1]"]

@pytest.mark.parametrize("content", BROKEN)
def test_broken_lines(content, tmp_path, model):
    (tmp_path / "p.jsonl").write_text(json.dumps(LINES[0]) + "\n" + content, "utf-8")
    assert "line 2" in run(geneval, model, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "o")


def test_broken_files(tmp_path, model):
    folder, file = tmp_path / "prompts", tmp_path / "p.jsonl"
    def complaint(path): return run(geneval, model, "--prompts", path, "--out", tmp_path / "o")
    folder.mkdir()
    assert "no .txt" in complaint(folder) and "give GenEval's" in complaint(file)
    (folder / "a.txt").write_text(" ", "utf-8")
    assert "a.txt is empty" in complaint(folder)
    (folder / "a.txt").write_bytes(b"\xff")
    assert "a.txt is not UTF-8" in complaint(folder)
    file.write_bytes(b"")
    assert "p.jsonl is empty" in complaint(file)
    file.write_bytes(b"\xff")
    assert "p.jsonl is not UTF-8" in complaint(file)


def test_a_model_of_classes(tmp_path, prompts):
    deco.save(tmp_path / "c", deco.create("deco-tiny", num_classes=2), dict(size=16))
    command = [tmp_path / "c", "--prompts", prompts / "g.jsonl", "--out", tmp_path / "o"]
    assert "knows classes" in run(geneval, *command)
