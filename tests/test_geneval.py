"The layouts of GenEval and DPG-Bench, read as their programs read them."
import json
import os
import re
import subprocess
import sys
import pytest
import torch
from PIL import Image
import deco
from conftest import run
from deco import geneval
from deco.geneval import problems, read_items, write_item

LINES = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
         {"tag": "counting", "include": [{"class": "cow", "count": 3}], "exclude": [{"class": "cow", "count": 4}], "prompt": "a photo of three cows"}]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "A model that is told something, with random weights, as a run leaves it."
    folder, model = tmp_path_factory.mktemp("told"), deco.create("deco-tiny", text_width=384, text_length=16, text_depth=1)
    for p in model.head.parameters(): torch.nn.init.normal_(p, std=0.1)
    deco.save(folder, model, dict(size=16, text=dict(name="minilm", length=16), prompts=["x"], images_seen=0))
    return folder


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (tmp_path / "d").mkdir()
    for name, text in (("localnarratives10", "A long prompt.\n"), ("partiprompts7", "Another, über alles.\n")): (tmp_path / "d" / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def as_geneval(root):
    "What evaluate_images.py takes: folders whose names are digits, json.load of metadata.jsonl, samples that match \\d+\\.png."
    found = {}
    for name in os.listdir(root):
        if not (root / name).is_dir() or not name.isdigit(): continue
        with open(root / name / "metadata.jsonl") as f: metadata = json.load(f)
        found[metadata["prompt"]] = [Image.open(root / name / "samples" / p).size for p in os.listdir(root / name / "samples") if re.match(r"\d+\.png", p)]
    return found


def test_geneval(told, prompts):
    command = [told, "--prompts", prompts / "g.jsonl", "--out", prompts / "out", "--steps", 2, "--seed", 5]
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
    for ignored in (["--num-images", 8], ["--prompt", "x"], ["--labels", "random"]): assert ignored[0] in run(geneval, *command, *ignored)


def test_dpg(told, prompts):
    command = [told, "--prompts", prompts / "d", "--out", prompts / "out", "--steps", 2]
    assert run(geneval, *command) == ""
    root = prompts / "out" / "images"
    assert {p: Image.open(root / p).size for p in os.listdir(root)} == {"localnarratives10.png": (32, 32), "partiprompts7.png": (32, 32)}      # every file is read
    assert "--per-prompt 3" in run(geneval, *command, "--per-prompt", 3)


def test_ranks_share_the_prompts(told, prompts):
    "Two processes make the files that one makes."
    alone, both = prompts / "one", prompts / "two"
    command = [told, "--prompts", prompts / "g.jsonl", "--steps", 2]
    assert run(geneval, *command, "--out", alone) == ""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "deco.geneval",
                           *map(str, command), "--out", both], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    files = lambda root: {p.relative_to(root): p.read_bytes() for p in (root / "images").rglob("*") if p.is_file()}
    assert files(alone) == files(both)


def test_problems(prompts):
    items, root, images = read_items(prompts / "g.jsonl"), prompts / "r", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for item in items: write_item(root, item, images)
    assert problems(root, items, 2, 8) == []
    assert len(problems(root, items, 3, 8)) == 2 and len(problems(root, items, 2, 9)) == 4
    (root / "stray.png").write_bytes(b"")
    (root / "00000" / "metadata.jsonl").write_text("{}")
    (root / "00001" / "samples" / "00001.png").write_bytes(b"\x89PNG")
    said = " ".join(problems(root, items, 2, 8))
    assert "stray.png does not belong" in said and "is not the metadata" in said and "no whole picture" in said


@pytest.mark.parametrize("content", ["a photo", '{"tag": "x"}', '{"prompt": "", "tag": "x"}', '{"prompt": 5, "tag": "x"}', "[1]"])
def test_broken_prompts(content, tmp_path, told):
    (tmp_path / "p.jsonl").write_text(json.dumps(LINES[0]) + "\n" + content)
    assert "line 2" in run(geneval, told, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "no .txt" in run(geneval, told, "--prompts", tmp_path / "empty", "--out", tmp_path / "o")
    (tmp_path / "empty" / "a.txt").write_text(" ")
    assert "a.txt is empty" in run(geneval, told, "--prompts", tmp_path / "empty", "--out", tmp_path / "o")
    for path, content, said in ((tmp_path / "p.jsonl", b"", "p.jsonl is empty"), (tmp_path / "p.jsonl", b"\xff", "p.jsonl is not UTF-8"),
                                (tmp_path / "empty" / "a.txt", b"\xff", "a.txt is not UTF-8")):
        path.write_bytes(content)
        assert said in run(geneval, told, "--prompts", path if path.suffix == ".jsonl" else path.parent, "--out", tmp_path / "o")


def test_a_model_of_classes(tmp_path, prompts):
    deco.save(tmp_path / "c", deco.create("deco-tiny", num_classes=2), dict(size=16))
    assert "knows classes" in run(geneval, tmp_path / "c", "--prompts", prompts / "g.jsonl", "--out", tmp_path / "o")
