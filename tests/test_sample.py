"Which average draws, and which labels: runs as deco.train leaves them, made by hand."
import json
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
import deco
from conftest import run
from deco import evaluate as evaluation
from deco import sample as sampling
from deco.core import file_hash
from deco.sample import pick_average, pick_labels

CLASSES = ["blue", "green", "red"]


@pytest.fixture
def trained(tmp_path):
    "A run with three averages; their heads differ, and so does what they draw."
    folder, model = tmp_path / "run", deco.create("deco-tiny", num_classes=3)
    info = dict(classes=CLASSES, size=16, class_counts=[6, 1, 0], images_seen=7, train=dict(ema_decay=[0.99, 0.999, 0.9999], repa="none"))
    deco.save(folder, model, info)
    for decay, value in ((0.999, 0.1), (0.9999, 0.9)):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state["head.linear.bias"].fill_(value)
        save_file(state, folder / f"model-{decay}.safetensors")
    return folder


def edit(folder, **changes):
    info = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (info | changes).items() if v is not None}))


def draw(folder, out, *flags): return run(sampling, folder, "--num-images", 6, "--steps", 2, "--out", out, *flags)


def test_average(trained, tmp_path):
    made = {}
    for flags, decay, file in (([], 0.99, "model"), (["--ema", 0.99], 0.99, "model"), (["--ema", 0.9999], 0.9999, "model-0.9999")):
        out = tmp_path / f"set{len(made)}{len(flags)}{decay}"
        assert draw(trained, out, *flags) == ""
        settings = json.loads((out / "samples.json").read_text())
        assert settings["ema_decay"] == decay and settings["weights"] == file_hash(trained / f"{file}.safetensors")
        made[out] = [p.read_bytes() for p in sorted(out.glob("*.png"))]
    default, first, third = made.values()
    assert default == first != third
    assert "ema_decay 0.9999 (now 0.99)" in draw(trained, out)                       # two averages don't mix in one folder
    said = draw(trained, tmp_path / "no", "--ema", 0.5)
    assert "--ema 0.5" in said and "0.99, 0.999, 0.9999" in said and not (tmp_path / "no").exists()
    (trained / "model-0.999.safetensors").unlink()
    assert "model-0.999.safetensors" in draw(trained, tmp_path / "no", "--ema", 0.999)
    assert "no config.json" in draw(tmp_path / "nowhere", tmp_path / "no", "--ema", 0.999)


@pytest.mark.parametrize("decay", [0.995, None])
def test_average_of_an_older_run(decay, trained):
    "One number instead of a list, or nothing."
    edit(trained, train=dict(ema_decay=decay))
    assert pick_average(trained) == ("model.safetensors", decay)
    with pytest.raises(ValueError, match="--ema 0.9:"): pick_average(trained, 0.9)


def test_labels_in_the_shares_of_the_data(trained, tmp_path):
    counts = [600, 300, 100, 0]
    drawn = pick_labels(2000, [0, 1, 2, 3], "data", 1, counts)
    assert abs(np.bincount(drawn, minlength=4) / 2000 - np.array([0.6, 0.3, 0.1, 0])).max() < 0.03
    assert drawn[:70] == pick_labels(70, [0, 1, 2, 3], "data", 1, counts) != pick_labels(70, [0, 1, 2, 3], "data", 2, counts)
    assert set(pick_labels(200, [2, 1], "data", 0, counts)) == {1, 2}                # of the chosen classes alone
    assert draw(trained, tmp_path / "a", "--labels", "data") == ""
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["labels"] == "data"
    assert "class_counts" in draw(trained, tmp_path / "b", "--labels", "data", "--classes", "red")       # no image of it
    for wrong in (None, [6, 1]):                                                     # none, or of other classes
        edit(trained, class_counts=wrong)
        said = draw(trained, tmp_path / "b", "--labels", "data")
        assert said.startswith("error: ") and '"class_counts"' in said and "config.json" in said and not (tmp_path / "b").exists()
    assert draw(trained, tmp_path / "c") == ""                                       # other rules don't need it


def test_the_shift_is_that_of_the_run(trained, tmp_path):
    "By default; a run that does not say has 1, and what is asked for goes first."
    shift = lambda out: json.loads((tmp_path / out / "samples.json").read_text())["shift"]
    assert draw(trained, tmp_path / "a") == "" and shift("a") == 1.0
    train = json.loads((trained / "config.json").read_text())["train"]
    edit(trained, train=train | dict(sample_shift=2.5))
    assert draw(trained, tmp_path / "b") == "" and shift("b") == 2.5
    assert draw(trained, tmp_path / "c", "--shift", "3") == "" and shift("c") == 3.0
    edit(trained, train={k: v for k, v in train.items() if k != "sample_shift"})
    assert draw(trained, tmp_path / "d") == "" and shift("d") == 1.0


def test_a_weak_model_knows_the_same(trained, tmp_path):
    "Autoguidance takes a run on the same data, and no other."
    assert draw(trained, tmp_path / "x.png", "--weak", trained) == ""
    for one, other in ((trained, "scenes-toy"), (trained, "cifar10-toy"), ("openmoji-toy", "cifar10-toy"), ("scenes-toy", "cifar10-toy")):
        assert f"--weak {other} knows other classes or words" in draw(one, tmp_path / "x.png", "--weak", other)


def test_long_lists_of_prompts_are_cut(tmp_path, capsys):
    assert run(sampling, "scenes-toy", "--num-images", 12, "--steps", 1, "--out", tmp_path / "x.png") == ""
    assert capsys.readouterr().out.strip().endswith(" and 2 more")


def test_random_labels_are_what_they_were():
    "The labels of sets that exist: drawn with torch alone."
    def label(i):
        digest = __import__("hashlib").blake2b(repr(("label", 5, i)).encode(), digest_size=8).digest()
        return int(torch.randint(10, (), generator=torch.Generator().manual_seed(int.from_bytes(digest, "big"))))
    assert pick_labels(50, list(range(10)), "random", 5) == [label(i) for i in range(50)]


@pytest.mark.parametrize("command", [sampling, evaluation])
def test_help(command):
    "Defaults are named where there are any."
    text = " ".join(command.arguments().format_help().split())
    assert "(default: )" not in text and "(default: None)" not in text and "SUPPRESS" not in text
    assert "steps of the solver (default: 50)" in text and "--ema DECAY" in text and "{balanced,random,data}" in text
