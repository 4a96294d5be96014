"Shapes against pictures drawn by hand, captions read by regular expressions; the judge against both."
import re
from itertools import combinations, product
from time import process_time
from timeit import repeat
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from deco import shapes as module
from deco.core import generator
from deco.data import to_tensor
from deco.shapes import (asks, COLOURS, coverage, detect, draw_scene, HELD_OUT_PAIRS, HELD_OUT_POSITIONS,
                         NUMBERS, OPPOSITE, prompts, random_scene, RELATIONS, Scene, scenes, score, SHAPES,
                         TASKS, Thing, training_scene, wanted)

SHAPE = "(circle|square|triangle|cross)"
CAPTION = re.compile(rf"a photo of (?:a(?: (\w+))?|two|three|four) {SHAPE}(?:e?s)?"
                     rf"(?: (and|left of|right of|above|below) a(?: (\w+))? {SHAPE})?")


def picture(*things, size=64, ground=(236, 236, 236)):
    "A picture by PIL of things (shape, colour, x, y, side) in pixels: drawn eight times too large, averaged."
    image = Image.new("RGB", (8 * size, 8 * size), ground)
    pen = ImageDraw.Draw(image)
    for shape, colour, x, y, side in things:
        l, t = 8 * (x - side / 2), 8 * (y - side / 2)
        r, b = 8 * (x + side / 2) - 1, 8 * (y + side / 2) - 1
        third = 8 * side / 3
        fill = COLOURS.get(colour, colour)
        if shape == "circle": pen.ellipse((l, t, r, b), fill)
        elif shape == "square": pen.rectangle((l, t, r, b), fill)
        elif shape == "triangle": pen.polygon([(l, b), (r, b), ((l + r) / 2, t)], fill)
        elif shape == "cross":
            pen.rectangle((l + third, t, r - third, b), fill)
            pen.rectangle((l, t + third, r, b - third), fill)
        elif shape == "half": pen.pieslice((l, t, r, b), 180, 360, fill)
        elif shape == "ring": pen.ellipse((l, t, r, b), outline=fill, width=round(2 * side))
        elif shape == "bar": pen.rectangle((l, t + third, r, b - third), fill)
        elif shape == "arrow": pen.polygon([(l, t), (r, t), ((l + r) / 2, b)], fill)
    return to_tensor(image.reduce(8))


def some(task, n, seed=1): return [training_scene(task, generator("scene", seed, i)) for i in range(n)]


def spoiled(image, noise, blur, i):
    "Blurred with this width in pixels, then noisy with this share of the range."
    x = ndimage.gaussian_filter(image.numpy().astype(float), (0, blur, blur))
    x += 255 * noise * torch.randn(x.shape, generator=generator("spoil", i)).numpy()
    return torch.from_numpy(x.round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size, n", [(32, 300), (48, 100), (64, 100), (128, 50)])
@pytest.mark.parametrize("task", TASKS)
def test_right(task, size, n):
    "What was drawn is detected: shapes, colours, places to a third of a pixel, sizes to two thirds."
    right = 0
    for s in some(task, n):
        result = score(draw_scene(s, size), s.caption)
        right += result["correct"]
        assert result["correct"] == (result["reason"] == "")
        for t in s.things:
            near = min(result["things"], key=lambda f: (f.x - t.x) ** 2 + (f.y - t.y) ** 2)
            if result["correct"]: assert near[:2] == t[:2]
            assert abs(near.x - t.x) * size < 1 / 3 and abs(near.y - t.y) * size < 1 / 3
            assert abs(near.size - t.size) * size < 2 / 3
    assert right >= 0.99 * n


@pytest.mark.parametrize("caption", sum(prompts(True).values(), []))
def test_right_held_out(caption):
    s = random_scene(caption, generator("scene", 2, caption))
    assert score(draw_scene(s, 32), caption)["reason"] == ""


RED, BLUE = ("circle", "red", 16, 16, 20), ("square", "blue", 46, 46, 20)

@pytest.mark.parametrize("things, caption, reason", [
    ([RED], "a photo of a circle", ""),
    ([RED, BLUE], "a photo of a circle", "two objects, not one"),
    ([], "a photo of a circle", "no object, not one"),
    ([RED], "a photo of a cross", "no cross"),
    ([BLUE], "a photo of a circle", "no circle"),
    ([RED, BLUE], "a photo of a square and a circle", ""),
    ([RED, BLUE], "a photo of a square and a triangle", "no triangle"),
    ([RED, ("circle", "blue", 46, 46, 20)], "a photo of a circle and a square", "no square"),
    ([RED], "a photo of a circle and a square", "one object, not two"),
    ([("triangle", c, x, y, 18) for c, x, y in (("red", 14, 14), ("black", 46, 18), ("red", 20, 48))],
     "a photo of three triangles", ""),
    ([("triangle", "red", x, y, 18) for x, y in ((14, 14), (46, 18))],
     "a photo of three triangles", "two objects, not three"),
    ([RED, *(("cross", "blue", 46, y, 18) for y in (16, 46))],
     "a photo of three crosses", "two crosses, not three"),
    ([RED, BLUE, ("square", "red", 16, 46, 18)], "a photo of three squares", "two squares, not three"),
    ([("circle", "red", x, y, 12) for x in (10, 30, 50) for y in (16, 46)],
     "a photo of four circles", "6 objects, not four"),
    ([RED], "a photo of a red circle", ""),
    ([RED], "a photo of a purple circle", "no purple circle"),
    ([BLUE], "a photo of a blue circle", "no blue circle"),
    ([RED, BLUE], "a photo of a red circle and a blue square", ""),
    ([RED, BLUE], "a photo of a blue circle and a red square", "no blue circle"),
    ([RED, BLUE], "a photo of a red circle and a green square", "no green square"),
    ([RED, BLUE, ("cross", "black", 46, 14, 18)],
     "a photo of a red circle and a blue square", "three objects, not two"),
    ([("half", "red", 32, 32, 24)], "a photo of a circle", "an unknown shape"),
    ([("ring", "red", 32, 32, 24)], "a photo of a circle", "an unknown shape"),
    ([("bar", "red", 32, 32, 24)], "a photo of a square", "an unknown shape"),
    ([("arrow", "red", 32, 32, 24)], "a photo of a triangle", "an unknown shape"),
    ([RED, ("square", "blue", 30, 16, 20)], "a photo of a circle and a square", "one object, not two"),
    ([RED, ("bar", "red", 19, 16, 36)], "a photo of a circle", "an unknown shape"),
])
def test_reasons(things, caption, reason):
    result = score(picture(*things), caption)
    assert result["reason"] == reason and result["correct"] == (reason == "")


@pytest.mark.parametrize("dx, dy, true", [
    (-30, 4, "left of"), (30, -9, "right of"), (5, -30, "above"), (-8, 30, "below"), (-30, 26, "left of"),
    (-26, 30, "below")])
def test_relations(dx, dy, true):
    "A circle and a square opposite: of the four relations just one holds; y points down."
    image = picture(("circle", "green", 32 + dx / 2, 32 + dy / 2, 18),
                    ("square", "black", 32 - dx / 2, 32 - dy / 2, 18))
    for relation in RELATIONS:
        wrong = "" if relation == true else f"circle not {relation} square"
        assert score(image, f"a photo of a circle {relation} a square")["reason"] == wrong
        reversed_words = f"a photo of a square {OPPOSITE[relation]} a circle"
        assert score(image, reversed_words)["correct"] == (relation == true)


def test_two_colours():
    "A circle half red, half blue is no circle of any colour."
    image = picture(("circle", "red", 32, 32, 24))
    image[:, :, 32:] = picture(("circle", "blue", 32, 32, 24))[:, :, 32:]
    assert not any(score(image, f"a photo of a {c} circle")["correct"] for c in COLOURS)


def test_drawn_as_by_pil():
    """The smooth edges are those of averaging a larger picture.

    At a corner, where half a pixel may stand for a quarter, to 0.25.
    """
    for shape, side in product(SHAPES, (8.5, 11.25)):
        s = Scene([Thing(shape, "black", 15.125 / 32, 16.5 / 32, side / 32)], 236 / 255, "")
        by_pil = picture((shape, "black", 15.125, 16.5, side), size=32)
        error = (draw_scene(s, 32).float() - by_pil.float()).abs() / 255
        assert error.mean() < 0.002 and error.max() < 0.26


def read(caption):
    "[(shape, colour)], relation: by a regular expression."
    c, a, relation, d, b = CAPTION.fullmatch(caption).groups()
    return [(a, c), (b, d)] if b else [(a, c)], relation


def test_held_out():
    "Of 20,000 training scenes none shows or names what is held out, and all else is there."
    pairs = set()
    positions = set()
    captions = set()
    for i in range(20_000):
        s = training_scene(TASKS[i % 6], generator("scene", 0, i))
        named, relation = read(s.caption)
        drawn = {t[:2] for t in s.things}
        assert drawn.isdisjoint(HELD_OUT_PAIRS) and set(named).isdisjoint(HELD_OUT_PAIRS)
        if relation in RELATIONS: positions.add((named[0][0], relation, named[1][0]))
        pairs |= drawn
        captions.add(s.caption)
    assert positions.isdisjoint(HELD_OUT_POSITIONS) and len(positions) == 48 - 8 and len(pairs) == 24 - 4
    assert captions == set(sum(prompts().values(), []))


def test_counting_captions():
    plurals = ("circles", "squares", "triangles", "crosses")
    words = [f"{n} {s}" for n in ("two", "three", "four") for s in plurals]
    assert prompts()["counting"] == [f"a photo of {w}" for w in words]


def test_what_is_held_out():
    shapes, colours = zip(*HELD_OUT_PAIRS)
    assert sorted(shapes) == sorted(SHAPES) and len(set(colours)) == 4
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert len(HELD_OUT_POSITIONS) == 8
    assert {(b, mirrored[r], a) for a, r, b in HELD_OUT_POSITIONS} == HELD_OUT_POSITIONS
    assert {k: len(v) for k, v in prompts().items()} == dict(zip(TASKS, (4, 12, 12, 20, 40, 252)))
    assert {k: len(v) for k, v in prompts(True).items()} == dict(colors=4, position=8, color_attr=108)
    for caption in sum(prompts(True).values(), []):
        named, relation = read(caption)
        position = (named[0][0], relation, named[-1][0])
        assert not HELD_OUT_PAIRS.isdisjoint(named) or position in HELD_OUT_POSITIONS


@pytest.mark.parametrize("task", TASKS)
def test_apart(task):
    "At 32 pixels: 2 clear pixels between two objects, one to the border, at least 8 each."
    for s in some(task, 200):
        named, relation = read(s.caption)
        count = next((n for n, word in enumerate(NUMBERS) if f" {word} " in s.caption), len(named))
        expected = [named[0][0]] * count if task == "counting" else [shape for shape, _ in named]
        assert [t.shape for t in s.things] == expected
        assert all(c in (None, t.colour) for (_, c), t in zip(named, s.things)) and 0.85 <= s.ground <= 1
        masks = [coverage(t.shape, 32 * t.x, 32 * t.y, 32 * t.size, 32) > 0.5 / 255 for t in s.things]
        for mask in masks:
            assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()
            assert mask.any(0).sum() >= 8 and mask.any(1).sum() >= 8
        for a, b in combinations(masks, 2):
            wider = [ndimage.binary_dilation(mask, np.ones((3, 3))) for mask in (a, b)]
            assert not (wider[0] & wider[1]).any()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("noise, blur", [(0.05, 0), (0, 0.7), (0.05, 0.7)])
def test_spoiled(task, noise, blur):
    "Noise of a twentieth of the range, and a blur, at 32 pixels."
    right = 0
    for i, s in enumerate(some(task, 100)):
        right += score(spoiled(draw_scene(s, 32), noise, blur, i), s.caption)["correct"]
    assert right >= 97


def test_function_of_seed_and_index(tmp_path):
    def seven(seed): return training_scene("counting", generator("scene", seed, 7))
    assert seven(3) == seven(3) != seven(4)
    images = scenes(32, tmp_path, num=13, seed=3)
    assert images.labels.tolist() == [*range(6), *range(6), 0]
    assert tuple(images.classes) == TASKS and not images.can_flip.any()
    for i in (0, 7, 12):
        s = training_scene(TASKS[i % 6], generator("scene", 3, i))
        assert images.captions[i] == s.caption and torch.equal(images.pixels[i], draw_scene(s, 32))
    again = scenes(32, tmp_path, num=13, seed=3)
    assert (tmp_path / "scenes-32.safetensors").exists()
    assert torch.equal(again.pixels, images.pixels) and again.captions == images.captions
    with pytest.raises(ValueError, match="scenes-32.safetensors holds 13 scenes, not 14"):
        scenes(32, tmp_path, num=14, seed=3)


@pytest.mark.parametrize("change", [dict(seed=4), dict(red=(210, 30, 30)), dict(plural="three crosss")])
def test_no_scenes_of_another_seed_or_version(tmp_path, monkeypatch, change):
    "A cache that this version would not draw is not trained on in silence."
    scenes(32, tmp_path, num=60, seed=3)
    scenes(32, tmp_path, num=60, seed=3)
    if "red" in change: monkeypatch.setitem(COLOURS, "red", change["red"])
    if "plural" in change:
        monkeypatch.setattr(module, "in_words", lambda n, noun: f"{NUMBERS[n]} {noun}s")
        monkeypatch.setattr(module, "asks", asks.__wrapped__)               # without what they have kept
        monkeypatch.setattr(module, "prompts", prompts.__wrapped__)
    complaint = "scenes-32.safetensors holds scenes of another seed or version: remove it"
    with pytest.raises(ValueError, match=complaint):
        scenes(32, tmp_path, num=60, seed=change.get("seed", 3))


@pytest.mark.parametrize("size", [24, 32, 128])
def test_nothing_there(size):
    "Blank, black, white, noise of three kinds, one pixel: never right, never an exception or a warning."
    g = generator("junk", size)
    junk = [torch.full((3, size, size), v, dtype=torch.uint8) for v in (0, 128, 240, 255)]
    junk += [torch.randint(256, (3, size, size), dtype=torch.uint8, generator=g) for _ in range(10)]
    for channels in (1, 3):
        black_or_white = torch.randint(2, (channels, size, size), generator=g) * 255
        junk.append(black_or_white.to(torch.uint8).expand(3, -1, -1))
    junk += [junk[3].clone().index_fill_(2, torch.tensor([size // 2]), 0)]
    with np.errstate(all="raise"):
        for image in junk:
            for captions in prompts().values(): assert not score(image, captions[0])["correct"]


@pytest.mark.parametrize("caption", [
    "", "circle", "a photo of a circle.", "A photo of a circle", "a photo of a pentagon",
    "a photo of two circle", "a photo of two crosss", "a photo of five squares", "a photo of a pink circle",
    "a photo of a circle and a circle", "a photo of a red circle and a red square",
    "a photo of a circle near a square"])
def test_unreadable_caption(caption):
    complaint = re.escape(f"cannot read caption {caption!r}: deco.shapes.asks() lists all there are")
    with pytest.raises(ValueError, match=complaint): wanted(caption)
    with pytest.raises(ValueError, match=re.escape(repr(caption))): score(picture(RED), caption)


@pytest.mark.parametrize("shape, dtype", [
    ((3, 32, 32), torch.float), ((1, 3, 32, 32), torch.uint8), ((32, 32, 3), torch.uint8),
    ((3, 32, 48), torch.uint8), ((), torch.uint8)])
def test_no_image(shape, dtype):
    with pytest.raises(ValueError, match=r"uint8 \(3, S, S\)"): detect(torch.zeros(shape, dtype=dtype))


def test_too_small():
    with pytest.raises(ValueError, match="24 pixels, not 23"): draw_scene(some("colors", 1)[0], 23)


def test_speed():
    "3 ms of a processor for an image at 32 pixels, with as much again for a slow one."
    pictures = [(draw_scene(s, 32), s.caption) for task in TASKS for s in some(task, 10)]
    def judge_all():
        for p in pictures: score(*p)
    seconds = min(repeat(judge_all, number=1, repeat=3, timer=process_time))
    assert seconds / len(pictures) < 0.006
