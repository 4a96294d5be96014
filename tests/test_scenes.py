"The six-task score: chance against counts made on paper, the benchmark against a painter, the command."
import json
from math import sqrt
import pytest
import torch
from conftest import run
from deco import scenes as module
from deco.core import generator
from deco.data import to_float
from deco.scenes import chance, score_run, Scoring, shares
from deco.shapes import detect, draw_scene, mismatch, prompts, random_scene, TASKS, training_scene, wanted


@pytest.mark.parametrize("task", TASKS)
def test_shuffled(task):
    "Each picture against prompts drawn anew: the score is `chance`, which on paper is this."
    paper = dict(single_object=1 / 4, two_object=2 / 12, counting=1 / 12, colors=1 / 20, position=2 / 40,
                 color_attr=2 / 252)[task]
    assert chance(task) == pytest.approx(paper)
    g = generator("shuffled", task)
    n, each = 300, 20
    right = 0
    for i in range(n):
        things = detect(draw_scene(training_scene(task, generator("scene", 1, i)), 32))
        captions = [prompts()[task][k] for k in torch.randint(len(prompts()[task]), (each,), generator=g)]
        right += sum(not mismatch(things, wanted(c)) for c in captions)
    assert abs(right / (n * each) - paper) < 3 * sqrt(paper * (1 - paper) / (n * each))


def test_chance_held_out():
    "Four colours; four positions, each in two wordings; 108 pairs of pairs, each in two orders."
    assert chance("colors", True) == 1 / 4 and chance("position", True) == 1 / 4
    assert chance("color_attr", True) == pytest.approx(2 / 108)


def truth(model, encoder, captions, size, **sampler):
    "Draw what the captions say."
    drawn = [draw_scene(random_scene(c, generator("scene", 5, i, c)), size) for i, c in enumerate(captions)]
    return to_float(torch.stack(drawn))


def test_benchmark_of_one_who_can_draw(monkeypatch):
    "Who draws what it is told has all right; who draws what it is told next has next to nothing right."
    monkeypatch.setattr(module, "sample_prompts", truth)
    for held_out in (False, True):
        rows = module.benchmark(None, None, 30, held_out)
        assert {r["task"] for r in rows} == set(prompts(held_out))
        assert all(r["caption"] in prompts(held_out)[r["task"]] for r in rows)
        assert min(shares(rows).values()) > 0.99
    captions = {r["caption"] for r in module.benchmark(None, None, 40)}
    assert len(captions) == 4 + 12 + 12 + 20 + 40 + 40                      # in turn, or spread out

    def late(model, encoder, captions, size, **sampler):
        return truth(None, None, captions[1:] + captions[:1], size)
    monkeypatch.setattr(module, "sample_prompts", late)
    assert shares(module.benchmark(None, None, 40))["mean"] < 0.25


def test_score_run_is_the_command(tmp_path, capsys):
    "From Python and from the command line: the same verdicts, and shares that are those of the verdicts."
    settings = Scoring(run="scenes-toy", per_task=2, steps=2, guidance=(1.0, 3.0), device="cpu")
    rows, lines = score_run(settings)
    path = tmp_path / "s.json"
    flags = ["--per-task", 2, "--steps", 2, "--guidance", 1, 3, "--out", path, "--device", "cpu"]
    assert run(module, "scenes-toy", *flags) == ""
    assert json.loads(path.read_text("utf-8")) == rows
    printed = capsys.readouterr().out
    assert printed.count("never seen") == 2 and "color_attr" in printed
    for line in lines:
        condition = (line["guidance"], line["held_out"])
        verdicts = [r for r in rows if (r["guidance"], r["held_out"]) == condition]
        tasks = {r["task"] for r in verdicts}
        assert tasks == set(prompts(line["held_out"]))
        for task in tasks: assert line[task] == sum(r["correct"] for r in verdicts if r["task"] == task) / 2
        assert line["mean"] == pytest.approx(sum(line[task] for task in tasks) / len(tasks))


def test_bad_input(tmp_path):
    assert "knows classes" in run(module, "openmoji-toy", "--device", "cpu")
    wanted = "--per-task must be a whole number from 1 to 10000000, not 0"
    assert wanted in run(module, "scenes-toy", "--per-task", 0)
    assert "--seed must be at least 0" in run(module, "scenes-toy", "--seed", -1)
    assert "did you mean --per-task?" in run(module, "scenes-toy", "--per-tasks", 3)
    with pytest.raises(ValueError, match="--per-task must be a whole number from 1 to 10000000, not 0"):
        score_run(Scoring(run="scenes-toy", per_task=0))
