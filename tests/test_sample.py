"Which average draws, and which labels: runs as deco.train leaves them, made by hand."
import contextlib
import copy
import hashlib
import json
import shlex
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
import deco
from conftest import run
from deco import demo, geneval
from deco import evaluate as evaluation
from deco import sample as sampling
from deco.core import command_line, file_hash, parse_settings, Parser
from deco.sample import draw, pick_average, pick_classes, pick_labels, prepare, Sampling

CLASSES = ["blue", "green", "red"]


@pytest.fixture
def trained(tmp_path):
    "A run with three averages; their heads differ, and so does what they draw."
    folder, model = tmp_path / "run", deco.create("deco-tiny", num_classes=3)
    deco.save(folder, model, dict(classes=CLASSES, size=16, class_counts=[6, 1, 0], images_seen=7,
                                  train=dict(ema_decay=[0.99, 0.999, 0.9999], repa="none")))
    for decay, value in ((0.999, 0.1), (0.9999, 0.9)):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state["head.linear.bias"].fill_(value)
        save_file(state, folder / f"model-{decay}.safetensors")
    return folder


def edit(folder, **changes):
    "Change entries of a config.json; None takes one away."
    info = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in info.items() if v is not None}), "utf-8")


def command(folder, out, *flags) -> str:
    return run(sampling, folder, "--num-images", 6, "--steps", 2, "--out", out, *flags)


def settings_of(folder) -> dict: return json.loads((folder / "samples.json").read_text("utf-8"))


def pictures(folder) -> list[bytes]: return [p.read_bytes() for p in sorted(folder.glob("*.png"))]


def test_average(trained, tmp_path):
    sets = []
    for flags, decay, file in (([], 0.99, "model"), (["--ema", 0.99], 0.99, "model"),
                               (["--ema", 0.9999], 0.9999, "model-0.9999")):
        out = tmp_path / f"set{len(sets)}"
        assert command(trained, out, *flags) == ""
        settings = settings_of(out)
        assert settings["ema_decay"] == decay
        assert settings["weights"] == file_hash(trained / f"{file}.safetensors")
        sets.append(pictures(out))
    assert sets[0] == sets[1] != sets[2]
    assert "ema_decay 0.9999 (now 0.99)" in command(trained, out)      # two averages don't mix in one folder
    complaint = command(trained, tmp_path / "no", "--ema", 0.5)
    assert "--ema 0.5" in complaint and "0.99, 0.999, 0.9999" in complaint and not (tmp_path / "no").exists()
    (trained / "model-0.999.safetensors").unlink()
    assert "model-0.999.safetensors" in command(trained, tmp_path / "no", "--ema", 0.999)
    assert "no config.json" in command(tmp_path / "nowhere", tmp_path / "no", "--ema", 0.999)


@pytest.mark.parametrize("decay", [0.995, None])
def test_average_of_an_older_run(decay, trained):
    "One number instead of a list, or nothing."
    edit(trained, train=dict(ema_decay=decay))
    assert pick_average(trained) == ("model.safetensors", decay)
    with pytest.raises(ValueError, match="--ema 0.9:"): pick_average(trained, 0.9)


def test_classes_by_name():
    names = ["Red", "red panda", "7", "green"]
    assert pick_classes("RED, green,1,gr", names) == [0, 3, 1, 3]
    for wrong in ("re", "4", "blue"):                                        # two; no label; none
        with pytest.raises(ValueError, match="0 Red, 1 red panda, 2 7"): pick_classes(wrong, names)


def test_labels_in_the_shares_of_the_data(trained, tmp_path):
    four, counts = [0, 1, 2, 3], [600, 300, 100, 0]
    drawn = pick_labels(2000, four, "data", 1, counts)
    assert abs(np.bincount(drawn, minlength=4) / 2000 - np.array([0.6, 0.3, 0.1, 0])).max() < 0.03
    assert drawn[:70] == pick_labels(70, four, "data", 1, counts) != pick_labels(70, four, "data", 2, counts)
    assert set(pick_labels(200, [2, 1], "data", 0, counts)) == {1, 2}        # of the chosen classes alone
    assert command(trained, tmp_path / "a", "--labels", "data") == ""
    assert settings_of(tmp_path / "a")["labels"] == "data"
    none_of_it = ["--labels", "data", "--classes", "red"]
    assert "class_counts" in command(trained, tmp_path / "b", *none_of_it)
    for wrong in (None, [6, 1]):                                             # no counts, or of other classes
        edit(trained, class_counts=wrong)
        complaint = command(trained, tmp_path / "b", "--labels", "data")
        assert complaint.startswith("error: ")
        assert '"class_counts"' in complaint and "config.json" in complaint
        assert not (tmp_path / "b").exists()
    assert command(trained, tmp_path / "c") == ""                            # other rules don't need them


def test_the_shift_is_that_of_the_run(trained, tmp_path):
    "By default; a run that does not say has 1, and what is asked for goes first."
    train = json.loads((trained / "config.json").read_text("utf-8"))["train"]
    for name, changes, flags, shift in (("a", {}, [], 1.0), ("b", dict(sample_shift=2.5), [], 2.5),
                                        ("c", dict(sample_shift=2.5), ["--shift", "3"], 3.0)):
        edit(trained, train=train | changes)
        assert command(trained, tmp_path / name, *flags) == ""
        assert settings_of(tmp_path / name)["shift"] == shift


def test_a_weak_model_knows_the_same(trained, tmp_path):
    "Autoguidance takes a run on the same data, and no other."
    assert command(trained, tmp_path / "x.png", "--weak", trained) == ""
    pairs = ((trained, "scenes-toy"), (trained, "cifar10-toy"), ("openmoji-toy", "cifar10-toy"),
             ("scenes-toy", "cifar10-toy"))
    for one, other in pairs:
        complaint = command(one, tmp_path / "x.png", "--weak", other)
        assert f"--weak {other} knows other classes or words" in complaint


def test_long_lists_of_prompts_are_cut(tmp_path, capsys):
    assert run(sampling, "scenes-toy", "--num-images", 12, "--steps", 1, "--out", tmp_path / "x.png") == ""
    assert capsys.readouterr().out.strip().endswith(" and 2 more")


def test_random_labels_are_what_they_were():
    "The labels of sets that exist: drawn with torch alone."
    def label(i):
        digest = hashlib.blake2b(repr(("label", 5, i)).encode(), digest_size=8).digest()
        g = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return int(torch.randint(10, (), generator=g))
    assert pick_labels(50, list(range(10)), "random", 5) == [label(i) for i in range(50)]


def test_one_call_is_the_command(trained, tmp_path):
    "From Python as from the command line, for a grid and a set; settings give the command that gives them."
    for name in ("a.png", "a", "a.npz"):
        cfg = Sampling(run=str(trained), num_images=6, steps=2, interval=(0.1, 1), out=str(tmp_path / name))
        before = copy.copy(cfg)
        line = draw(cfg)
        assert cfg == before and line.startswith(f"{tmp_path / name}: 6 images")
        words = shlex.split(command_line("sample", cfg))[3:]
        assert parse_settings(Parser("sample"), Sampling, words) == cfg
        assert run(sampling, *words, "--out", tmp_path / name.replace("a", "b")) == ""
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(pictures(tmp_path / "a")) == 6 and pictures(tmp_path / "a") == pictures(tmp_path / "b")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])
    assert settings_of(tmp_path / "a") == settings_of(tmp_path / "b")


def test_settings_of_python(trained, tmp_path):
    "One prompt or size needs no list; a value out of range, or of another kind, is one line."
    assert prepare(Sampling(run=trained)).size == 16
    for size, expected in ((32, 32), ([32], 32), ((16, 32), [16, 32])):
        assert prepare(Sampling(run=trained, size=size)).size == expected
    draw(Sampling(run=trained, size=(16, 32), num_images=1, steps=1, out=tmp_path / "x"))
    assert Image.open(tmp_path / "x" / "000000.png").size == (32, 16)
    prepared = prepare(Sampling(run="scenes-toy", prompt="a photo of a cross", num_images=2))
    assert prepared.names == ["a photo of a cross"] and prepared.labels == [0, 0]
    assert prepared.settings["classes"] == prepared.names != prepared.info["classes"]
    for wrong, text in ((dict(num_images=0), "--num-images must be a whole number from 1 to 10000000, not 0"),
                        (dict(seed=-1), "--seed must be at least 0, not -1"),
                        (dict(solver="rk9"), "--solver"), (dict(size=(8, 8, 8)), "--size takes"),
                        (dict(size=42, out=tmp_path / "y"), "--size 42 must be a multiple")):
        with pytest.raises(ValueError, match=text): draw(Sampling(run=trained, **wrong))
    assert not (tmp_path / "y").exists()                                            # nor is a folder claimed


def test_a_set_of_before_is_continued(trained, tmp_path):
    "samples.json keeps its keys, values and their order: a set that was drawn before is accepted."
    settings = dict(
        run=str(trained), weights=file_hash(trained / "model.safetensors"), images_seen=7, ema_decay=0.99,
        num=6, seed=0, labels="balanced", classes=CLASSES, size=16, batch_size=64, steps=2, solver="euler",
        order=2, guidance=3.0, interval=[0.0, 1.0], shift=1.0, weak=None)
    assert command(trained, tmp_path / "a") == ""
    before = pictures(tmp_path / "a")
    (tmp_path / "a" / "samples.json").write_text(json.dumps(settings), "utf-8")
    (tmp_path / "a" / "000003.png").unlink()
    assert command(trained, tmp_path / "a") == "" and pictures(tmp_path / "a") == before
    assert list(settings_of(tmp_path / "a").items()) == list(settings.items())


@pytest.mark.parametrize("module", [sampling, evaluation, geneval, demo])
def test_help(module, capsys):
    "Defaults are named where there are any."
    with contextlib.suppress(SystemExit): module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: )" not in text and "(default: None)" not in text and "SUPPRESS" not in text
    assert "(default: auto)" in text and "MISSING" not in text
    if module is demo: return
    assert "steps of the solver (default: 50)" in text
    assert "--ema DECAY" in text and "{balanced,random,data}" in text
