"""The files that people have: odd pictures, layouts of data sets, what is left out; and all readers agree.

Expected pixels are worked out by hand here, from what was painted; expected labels from what was written.
"""
import io
import json
import os
import pickle
import shlex
import tarfile
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import make_tar, run
from deco import files, metrics
from deco.data import read_image
from deco.datasets import load_data, open_data
from deco.evaluate import ImageFiles, open_reference
from deco.files import InOrder, load_all
from deco.metrics import Classifier, Extractor, reference_statistics, statistics

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
SIZE = 16


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(k: int, size=(SIZE, SIZE)) -> Image.Image:
    "A picture of one colour, which tells k."
    return Image.new("RGB", size, (10 * (k % 25), 255 - 10 * (k % 25), (77 * k) % 256))


def colour(k: int) -> tuple: return plain(k).getpixel((0, 0))


# --- odd pictures: left half painted (200, 100, 50), right half transparent, hidden black or magenta

def half_transparent(mode: str) -> Image.Image:
    rgba = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    rgba.paste((200, 100, 50, 255), (0, 0, SIZE // 2, SIZE))
    return rgba.convert(mode)


def half_key(mode: str) -> tuple[Image.Image, object]:
    "A picture whose right half has the colour that stands for transparent, and that colour."
    image = Image.new("RGB", (SIZE, SIZE), (255, 0, 255))
    image.paste((200, 100, 50), (0, 0, SIZE // 2, SIZE))
    image = image.convert(mode)
    return image, image.getpixel((SIZE - 1, 0))


def palette() -> Image.Image:
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([200, 100, 50, 255, 0, 255])
    image.paste(0, (0, 0, SIZE // 2, SIZE))
    return image


PAINTED = {
    "RGBA.png": encoded(half_transparent("RGBA")), "RGBA.tif": encoded(half_transparent("RGBA"), "TIFF"),
    "RGBA.webp": encoded(half_transparent("RGBA"), "WEBP", lossless=True),
    "palette.png": encoded(palette(), transparency=1),
    "palette bytes.png": encoded(palette(), transparency=b"\xff\0"),
    "palette.gif": encoded(palette(), "GIF", transparency=1),
    "RGB with a key.png": encoded(half_key("RGB")[0], transparency=half_key("RGB")[1]),
    "an RGBA.png named.jpg": encoded(half_transparent("RGBA"))}
GREY = {
    "LA.png": encoded(half_transparent("LA")),
    "L with a key.png": encoded(half_key("L")[0], transparency=half_key("L")[1])}


@pytest.mark.parametrize("name", [*PAINTED, *GREY])
def test_transparent_parts_are_white(name, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes((PAINTED | GREY)[name])
    for pixels in as_everybody_reads(tmp_path / "x", tmp_path):
        left, right = pixels[0, :, :, :SIZE // 2], pixels[0, :, :, SIZE // 2:]
        assert (right == 255).all()
        expected = (200, 100, 50) if name in PAINTED else 3 * (124,)     # 0.299 R + 0.587 G + 0.114 B
        assert (left.float() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 1


@pytest.mark.parametrize("kind, order", [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">")])
def test_16_bits(kind, order, tmp_path):
    grey = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 257
    mode = "I;16B" if order == ">" else "I;16"
    image = Image.frombytes(mode, (SIZE, SIZE), grey.astype(f"{order}u2").tobytes())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"x.{kind.lower()}").write_bytes(encoded(image, kind))
    for pixels in as_everybody_reads(tmp_path / "x", tmp_path):
        assert torch.equal(pixels[0, 1], torch.tensor(grey // 257).to(torch.uint8))


def as_everybody_reads(folder: Path, root: Path) -> list[torch.Tensor]:
    "The pictures of a folder as training, load_data, the default reference and --samples read them."
    data = open_data(folder, SIZE, root / "cache")
    info = dict(train=dict(data=str(folder), data_root=str(root / "cache"), upright=True))
    reference, _, _ = open_reference("data", info, SIZE)
    paths = [data.path(k) for k in range(len(data))]
    return [data.take(torch.arange(len(data)))[0], load_data(str(folder), SIZE, root / "cache").pixels,
            torch.cat(list(reference)), torch.cat(list(ImageFiles(paths, SIZE)))]


STORED = {                      # EXIF's number, and how an upright array is stored so that it says the truth
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize("number", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_upright(number, kind, tmp_path):
    Image.init()
    if kind not in Image.SAVE: pytest.skip(f"this Pillow has no {kind}")
    upright = np.zeros((SIZE, SIZE, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = number
    options = dict(quality=100) if kind in ("JPEG", "AVIF") else dict(lossless=True) if kind == "WEBP" else {}
    stored = Image.fromarray(np.ascontiguousarray(STORED[number](upright)))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"x.{kind.lower()}").write_bytes(encoded(stored, kind, exif=exif, **options))
    for pixels in as_everybody_reads(tmp_path / "x", tmp_path):
        corners = pixels[0, :, 2::11, 2::11].permute(1, 2, 0).float()              # far from the borders
        assert (corners - torch.tensor(upright[2::11, 2::11]).float()).abs().max() < 40
    if kind == "TIFF": return                                                      # Pillow turns it anyhow
    as_stored = open_data(tmp_path / "x", SIZE, tmp_path / "cache", upright=False).take(torch.arange(1))[0]
    corners = as_stored[0, :, 2::11, 2::11].permute(1, 2, 0).float()
    assert (corners - torch.tensor(np.asarray(stored)[2::11, 2::11].copy()).float()).abs().max() < 40


def test_broken_exif_is_no_broken_picture(tmp_path):
    nonsense = b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense"
    (tmp_path / "x.jpg").write_bytes(encoded(plain(3), "JPEG", exif=nonsense, quality=100))
    mean = read_image(tmp_path / "x.jpg", SIZE).float().mean((1, 2))
    assert (mean - torch.tensor(colour(3))).abs().max() < 4


def test_postscript_is_never_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin
    def started(*args, **kwargs): pytest.fail("an interpreter was started")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    eps = encoded(plain(0), "EPS")
    (tmp_path / "x").mkdir()
    for k in range(200): (tmp_path / "x" / f"{k:03}.png").write_bytes(encoded(plain(k)))
    (tmp_path / "x" / "zz.jpg").write_bytes(eps)
    assert len(load_data(str(tmp_path / "x"), SIZE, tmp_path / "cache")) == 200
    with pytest.raises(ValueError, match="zz.jpg.*cannot identify"):
        read_image(tmp_path / "x" / "zz.jpg", SIZE)


def test_size_is_guarded_for_everybody(tmp_path):
    (tmp_path / "wide.png").write_bytes(encoded(Image.new("1", (9500, 9500))))
    (tmp_path / "thin.png").write_bytes(encoded(Image.new("L", (1, 5000))))
    for name, size in (("wide", SIZE), ("thin", 256)):
        with pytest.raises(ValueError, match=f"{name}.png.*too large"):
            read_image(tmp_path / f"{name}.png", size)


# --- layouts: the same pictures and labels from each

def members(k: int, label: object = None, kind: str = "cls") -> dict[str, bytes]:
    parts = {f"{k:04}.png": encoded(plain(k))}
    if label is not None:
        is_json = kind.lower() == "json"
        parts[f"{k:04}.{kind}"] = (json.dumps(dict(label=label)) if is_json else str(label)).encode()
    return parts


def write_table(path: Path, rows: list[dict], names: list[str] | None = None) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if names:
        notes = dict(info=dict(features=dict(label=dict(names=names, _type="ClassLabel"))))
        table = table.replace_schema_metadata({"huggingface": json.dumps(notes)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


def class_folders(root: Path, classes: list[str]) -> Path:
    for k in range(24):
        (root / classes[k % 12]).mkdir(parents=True, exist_ok=True)
        (root / classes[k % 12] / f"{k:04}.png").write_bytes(encoded(plain(k)))
    return root


def linked(root, classes):
    class_folders(root / "real", classes)
    (root / "links").mkdir()
    for name in classes: os.symlink(root / "real" / name, root / "links" / name)
    return root / "links"


def one_tar(root, classes, kind="cls", key="{:04}", prefix=""):
    content = {}
    for k in range(24):
        picture, label = members(k, classes[k % 12], kind).items()
        name = key.format(k)
        parts = {f"{prefix}{name}.png": picture[1], f"{prefix}{name}.{kind}": label[1]}
        content |= dict(reversed(parts.items())) if k % 2 else parts             # the label comes first, too
    return make_tar(root / "x.tar", content)


def json_first(root, classes):
    content = {}
    for k in range(24):
        content |= {f"{k:04}.json": b'{"width": 16}', f"{k:04}.png": encoded(plain(k)),
                    f"{k:04}.cls": classes[k % 12].encode()}
    return make_tar(root / "x.tar", content)


def in_folders(root, classes):
    content = {f"./train/{classes[k % 12]}/{k}.png": encoded(plain(k)) for k in range(24)}
    return make_tar(root / "x.tar", content)


def tar_per_class(root, classes, stem="n{:08}"):
    for c, name in enumerate(classes):
        make_tar(root / "tars" / f"{name}.tar", {f"{name}_{k}.JPEG": encoded(plain(k)) for k in (c, c + 12)})
    return root / "tars"


def img2dataset(root, classes):
    one_tar(root / "d", classes, "json").rename(root / "d" / "00000.tar")
    write_table(root / "d" / "00000.parquet", [dict(url="x", key="0", label="wrong")])
    (root / "d" / "00000_stats.json").write_text("{}", "utf-8")
    return root / "d"


def hub_clone(root, classes):
    rows = [dict(image=dict(bytes=encoded(plain(k)), path=f"{k}.png"), label=k % 12) for k in range(24)]
    for part in range(2):
        write_table(root / "repo" / "data" / f"train-{part:05}.parquet", rows[part::2], classes)
    (root / "repo" / "README.md").write_text("a data set", "utf-8")
    (root / "repo" / ".git").mkdir()
    (root / "repo" / ".git" / "x.png").write_bytes(b"no picture")
    return root / "repo"


def metadata(root, classes, kind="jsonl"):
    (root / "m" / "images").mkdir(parents=True)
    rows = [dict(file_name=f"images/{k}.jpg", label=classes[k % 12]) for k in range(24)]
    for k in range(24): (root / "m" / "images" / f"{k}.jpg").write_bytes(encoded(plain(k)))
    lines = list(map(json.dumps, rows))
    if kind == "csv": lines = ["file_name,label", *(",".join(row.values()) for row in rows)]
    (root / "m" / f"metadata.{kind}").write_text("\n".join(lines), encoding="utf-8")
    return root / "m"


LAYOUTS = {
    "class folders": class_folders, "links to class folders": linked, "tar with .cls": one_tar,
    "tar with .json": lambda r, c: one_tar(r, c, "json"), "tar with .json before .cls": json_first,
    "tar, upper case": lambda r, c: one_tar(r, c, "CLS"),
    "tar, dots in names": lambda r, c: one_tar(r, c, key="22.{:02}"),
    "tar, nested": lambda r, c: one_tar(r, c, prefix="a/b.c/"), "tar of class folders": in_folders,
    "one tar per class": tar_per_class, "img2dataset": img2dataset, "clone of a hub": hub_clone,
    "metadata.jsonl": metadata, "metadata.csv": lambda r, c: metadata(r, c, "csv")}
CLASSES = {"names": [f"n{k:08}" for k in range(12)], "numbers": [str(k) for k in range(12)],
           "from 1": [str(k) for k in range(1, 13)],
           "words": sorted("ант bee cat dog elk fox gnu hen ibex jay kiwi 猫".split())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_same_labels_from_everywhere(layout, classes, tmp_path):
    names = CLASSES[classes]
    source = LAYOUTS[layout](tmp_path, names)
    data = open_data(source, SIZE, tmp_path / "cache")
    for data in (data, open_data(source, SIZE, tmp_path / "cache")):                      # listed, and kept
        assert data.classes == names and len(data) == 24
        pixels, labels = data.take(torch.arange(24))
        seen = {}
        for image, label in zip(pixels, labels.tolist()): seen[tuple(image[:, 0, 0].tolist())] = label
        assert seen == {colour(k): k % 12 for k in range(24)}
    everything = load_data(str(source), SIZE, tmp_path / "cache")
    assert torch.equal(everything.pixels, pixels) and torch.equal(everything.labels, labels)
    info = dict(train=dict(data=str(source), data_root=str(tmp_path / "cache"), upright=True))
    reference, _, real = open_reference("data", info, SIZE)
    assert torch.equal(torch.cat(list(reference)), pixels) and torch.equal(real, labels)


def test_names_of_the_schema_keep_their_numbers(tmp_path):
    rows = [dict(image=encoded(plain(k)), label=k % 3) for k in range(6)]
    rows.append(dict(image=encoded(plain(9)), label=None))
    table = write_table(tmp_path / "t.parquet", rows, ["crane", "dog", "crane"])
    data = open_data(table, SIZE, tmp_path / "cache")
    assert data.classes == ["crane", "dog", "crane"] and data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.left_out == {"without a label": 1}


def test_names_of_labels_are_never_stale(tmp_path):
    rows = [dict(image=encoded(plain(k)), label=k) for k in range(2)]
    for names in (["cat", "dog"], None, ["elk", "fox"]):
        table = write_table(tmp_path / "t.parquet", rows, names)
        assert open_data(table, SIZE, tmp_path / "cache").classes == (names or ["0", "1"])
    tar = make_tar(tmp_path / "a.tar", members(0, 0) | members(1, 1))
    for names in (["ant", "bee"], ["hen", "jay"]):                               # edited beside the same tar
        (tmp_path / "classes.json").write_text(json.dumps(names), "utf-8")
        assert open_data(tar, SIZE, tmp_path / "cache").classes == names


def test_one_class(tmp_path):
    data = open_data(class_folders(tmp_path / "x", CLASSES["numbers"]), SIZE, tmp_path, one_class=True)
    assert data.classes == ["all"] and data.labels.tolist() == [0] * 24


@pytest.mark.parametrize("stems", [("00000", "00001"), ("train-000", "train-001"), ("a-0", "a-1")])
def test_a_series_of_shards_is_no_classes(stems, tmp_path):
    for k, stem in enumerate(stems): make_tar(tmp_path / "d" / f"{stem}.tar", members(k))
    assert open_data(tmp_path / "d", SIZE, tmp_path / "cache").classes == ["all"]


def test_tars_named_by_class(tmp_path):
    for k, stem in enumerate(("dogs", "cats")): make_tar(tmp_path / "d" / f"{stem}.tar", members(k))
    assert open_data(tmp_path / "d", SIZE, tmp_path / "cache").classes == ["cats", "dogs"]


@pytest.mark.parametrize("kind", ["python", "binary", "packed"])
@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_archives(kind, hundred, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, 3072), dtype=np.uint8), rng.integers(0, 3, 12)
    name = "cifar-100" if hundred else "cifar-10"
    words = [b"ant", b"bee", b"cat"]
    folder = tmp_path / {"python": "cifar-100-python" if hundred else "cifar-10-batches-py",
                         "binary": "cifar-100-binary" if hundred else "cifar-10-batches-bin"}.get(kind, "p")
    folder.mkdir()
    training = ["train"] if hundred else ["data_batch_1", "data_batch_2"]
    for part, file in zip(np.split(np.arange(12), len(training)), training):
        before = [np.full((len(part), 1), 9, np.uint8)] if hundred else []                # the coarse label
        rows = np.concatenate([*before, y[part, None].astype(np.uint8), x[part]], 1)
        key = b"fine_labels" if hundred else b"labels"
        values = {b"data": x[part], key: y[part].tolist(), b"coarse_labels": [9] * len(part)}
        content = pickle.dumps(values, protocol=2)
        if kind == "binary": (folder / f"{file}.bin").write_bytes(rows.tobytes())
        else: (folder / file).write_bytes(content)
    test = "test" if hundred else "test_batch"
    (folder / (f"{test}.bin" if kind == "binary" else test)).write_bytes(b"not to be trained on")
    meta = {b"fine_label_names" if hundred else b"label_names": words}
    if kind == "binary":
        (folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_bytes(b"\n".join(words))
    else: (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))
    source = folder
    if kind == "packed":
        source = tmp_path / f"{name}-python.tar.gz"
        with tarfile.open(source, "w:gz") as tar: tar.add(folder, "cifar")
    data = open_data(source, 32, tmp_path / "cache")
    assert torch.equal(data.pixels, torch.tensor(x).view(12, 3, 32, 32))
    assert data.labels.tolist() == y.tolist() and data.classes == ["ant", "bee", "cat"]


def test_a_pickle_never_runs(tmp_path):
    class Evil:
        def __reduce__(self): return Path.touch, (tmp_path / "ran",)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(ValueError, match="data_batch_1.*never run"): open_data(folder, 32, tmp_path)
    assert not (tmp_path / "ran").exists()


# --- what is left out

def test_what_is_left_out_is_counted(tmp_path, caplog):
    folder = tmp_path / "x"
    (folder / "cat").mkdir(parents=True)
    for k in range(4): (folder / "cat" / f"{k}.png").write_bytes(encoded(plain(k)))
    (folder / "cat" / "b.jfif").write_bytes(encoded(plain(5), "JPEG"))
    for name in ("a.heic", "b.heic", "c.CR2", "noise"): (folder / "cat" / name).write_bytes(b"x")
    for name in (".thumbnails", "__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(encoded(plain(0)))
    (folder / "cat" / "._0.png").write_bytes(b"mac")
    (folder / "cat" / "notes.txt").write_text("a caption or so", "utf-8")
    os.symlink("/nowhere", folder / "dog")
    os.symlink("..", folder / "cat" / "up")
    (folder / "old.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="1 .*tar and 5 pictures"):
        open_data(folder, SIZE, tmp_path / "cache")
    (folder / "old.tar").unlink()
    data = open_data(folder, SIZE, tmp_path / "cache")
    assert data.classes == ["cat"] and len(data) == 5
    assert data.left_out == {
        ".heic": 2, ".cr2": 1, "files without a suffix": 1, "hidden folders": 4, "hidden files": 1,
        "links that lead nowhere": 1, "links to a folder above them": 1}
    line = next(r.getMessage() for r in caplog.records if "left out of" in r.getMessage())
    for part in ("2 .heic", "4 hidden folders", "1 links that lead nowhere"): assert part in line


def test_shards_beside_a_picture(tmp_path):
    for s in range(2): make_tar(tmp_path / "d" / f"{s:05}.tar", members(s))
    (tmp_path / "d" / "logs").mkdir()
    assert len(open_data(tmp_path / "d", SIZE, tmp_path / "cache")) == 2
    (tmp_path / "d" / "preview.png").write_bytes(encoded(plain(0)))
    with pytest.raises(ValueError, match=r"2 \*.tar and 1 pictures: give one kind"):
        open_data(tmp_path / "d", SIZE, tmp_path)
    hub_clone(tmp_path, CLASSES["words"])
    (tmp_path / "repo" / "logo.png").write_bytes(encoded(plain(0)))
    with pytest.raises(ValueError, match="2 .*parquet and 1 pictures"):
        open_data(tmp_path / "repo", SIZE, tmp_path)


@pytest.mark.parametrize("places", [("train", "val"), ("Training", "Test"), ("valid", "test", "train")])
def test_parts_of_a_data_set_are_noticed(places, tmp_path, caplog):
    for k, place in enumerate(places):
        for name in "ab":
            (tmp_path / "f" / place / name).mkdir(parents=True)
            (tmp_path / "f" / place / name / "0.png").write_bytes(encoded(plain(k)))
        make_tar(tmp_path / "t" / f"{place}-000.tar", members(k))
        rows = [dict(image=encoded(plain(k)), label=0)]
        write_table(tmp_path / "p" / f"{place}-00000-of-00001.parquet", rows)
    for source in ("f", "t", "p"):
        caplog.clear()
        open_data(tmp_path / source, SIZE, tmp_path / "cache")
        assert "look like the" in caplog.text and all(place.lower() in caplog.text for place in places)
    caplog.clear()
    open_data(tmp_path / "f" / places[0], SIZE, tmp_path / "cache")
    assert "look like the" not in caplog.text


def test_damage_anywhere_in_a_tar(tmp_path):
    "Cuts, flipped bytes and zeros at many places: pictures are lost nowhere without being counted."
    content = {}
    for k in range(24): content |= members(k, k % 3)
    whole = make_tar(tmp_path / "w.tar", content).read_bytes()
    with tarfile.open(tmp_path / "w.tar") as tar: headers = [m.offset for m in tar]
    end = headers[-1] + 1024
    rng = np.random.default_rng(0)
    cuts = [*rng.integers(1, end, 60), *(512 * rng.integers(1, end // 512, 30))]
    damaged = [whole[:cut] for cut in cuts]
    damaged += [whole[:cut] + bytes(len(whole) - cut) for cut in 512 * rng.integers(1, end // 512 - 25, 20)]
    for header in headers[1::3]:
        flipped = bytearray(whole)
        flipped[header + 120] ^= 64
        damaged.append(flipped)
    for number, content in enumerate(damaged):
        path = tmp_path / "d.tar"
        path.write_bytes(content)
        left_out = files.Counter()
        rows = list(files._shard_rows(str(path), 0, left_out))
        assert left_out["damaged tars"] == 1 or len(rows) == 24, number
    left_out = files.Counter()
    assert len(list(files._shard_rows(str(tmp_path / "w.tar"), 0, left_out))) == 24 and not +left_out


def test_rows_without_a_picture(tmp_path):
    rows = [dict(image=encoded(plain(k)) if k % 4 else None, label=k % 3) for k in range(24)]
    data = open_data(write_table(tmp_path / "t.parquet", rows), SIZE, tmp_path / "cache")
    assert len(data) == 18 and data.left_out == {"rows without a picture": 6}
    empty = write_table(tmp_path / "n.parquet", [dict(image=dict(bytes=None, path="a.jpg"), label=0)])
    with pytest.raises((ValueError, FileNotFoundError), match="n.parquet|rows without a picture"):
        open_data(empty, SIZE, tmp_path / "cache")


def test_a_changed_table_takes_the_old_ones_place(tmp_path):
    rows = [dict(image=encoded(plain(k)), label=k) for k in range(3)]
    for n in (3, 2, 3):
        write_table(tmp_path / "t.parquet", rows[:n])
        assert len(open_data(tmp_path / "t.parquet", SIZE, tmp_path / "cache")) == n
        assert len(list((tmp_path / "cache").glob("parquet-*/*.tar"))) == 1


# --- the reference

def test_broken_ones_are_skipped_as_in_training(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for k in range(150): (folder / f"{k:03}.png").write_bytes(encoded(plain(k)))
    (folder / "zz.jpg").write_bytes(b"<html>404</html>")
    os.symlink("/nowhere.jpg", folder / "link.jpg")
    (folder / "d.jpg").mkdir()
    info = dict(train=dict(data=str(folder), data_root=str(tmp_path / "cache")))
    reference, _, labels = open_reference("data", info, SIZE)
    everything = load_data(str(folder), SIZE, tmp_path / "cache")
    assert len(torch.cat(list(reference))) == len(everything) == 150
    assert [tuple(p) for p in everything.pixels[:, :, 0, 0].tolist()] == [colour(k) for k in range(150)]


def tiny_extractor() -> Extractor:
    torch.manual_seed(0)
    net = Classifier(10).eval().requires_grad_(False)
    return Extractor("tiny", lambda images: net(images.float() / 127.5 - 1))


def stripes(tmp_path, n=60):
    for k in range(n):
        (tmp_path / "s").mkdir(exist_ok=True)
        image = Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(tmp_path / "s" / f"{k:03}.png")
    return open_data(tmp_path / "s", 32, tmp_path / "cache")


def test_a_stopped_reference_goes_on(tmp_path, monkeypatch):
    data = stripes(tmp_path)
    expected = statistics(InOrder(data), tiny_extractor(), 10)
    monkeypatch.setattr(metrics.time, "time", iter(range(0, 10**6, 400)).__next__)    # minutes for a batch
    calls = []
    def stopping(images):
        calls.append(len(images))
        if len(calls) == 4: raise KeyboardInterrupt
        return tiny_extractor().net(images)
    with pytest.raises(KeyboardInterrupt):
        reference_statistics(InOrder(data), Extractor("tiny", stopping), tmp_path / "r.safetensors", 10)
    [unfinished] = tmp_path.glob("r-unfinished*")
    again = reference_statistics(InOrder(data), Extractor("tiny", stopping), tmp_path / "r.safetensors", 10)
    assert sum(calls) == 70 and not unfinished.exists()                          # ten were lost, 30 were not
    for k, value in expected.items():
        if k in ("features", "logits"): assert torch.equal(again[k], value)
        elif isinstance(value, torch.Tensor): assert torch.allclose(again[k], value, rtol=1e-9, atol=1e-9), k
        else: assert again[k] == value


def test_a_kept_reference_is_not_read_again(tmp_path, monkeypatch):
    data = stripes(tmp_path)
    first = reference_statistics(InOrder(data), tiny_extractor(), tmp_path / "r.safetensors")
    reads = []
    real = files.decode
    monkeypatch.setattr(files, "decode", lambda *args: reads.append(args) or real(*args))
    assert reference_statistics(InOrder(data), tiny_extractor(), tmp_path / "r.safetensors")["count"] == 60
    assert not reads
    Image.new("RGB", (32, 32)).save(tmp_path / "s" / "003.png")                   # overwritten in its place
    data = open_data(tmp_path / "s", 32, tmp_path / "cache")
    second = reference_statistics(InOrder(data), tiny_extractor(), tmp_path / "r.safetensors")
    assert reads and second["fingerprint"] != first["fingerprint"]


def test_many_images_keep_few_features(tmp_path, monkeypatch):
    data = load_all(stripes(tmp_path))
    all_of_them = statistics(data.pixels, tiny_extractor(), 7)
    monkeypatch.setattr(metrics, "_KEPT", 20)
    few = statistics(data.pixels, tiny_extractor(), 7)
    assert len(few["features"]) == 15
    assert torch.allclose(few["features"], all_of_them["features"][::4], atol=1e-5)
    assert torch.allclose(few["sigma"], all_of_them["sigma"]) and few["count"] == 60


@pytest.mark.parametrize("reference", ["x.tar", "tars", "t.parquet", "{0..1}.tar", "openmoji"])
def test_whatever_trains_is_a_reference(reference, tmp_path):
    make_tar(tmp_path / "x.tar", members(0, 1) | members(1, 2))
    for s in range(2): make_tar(tmp_path / "tars" / f"{s}.tar", members(s))
    for s in range(2): make_tar(tmp_path / f"{s}.tar", members(s))
    write_table(tmp_path / "t.parquet", [dict(image=encoded(plain(k)), label=0) for k in range(2)])
    name = reference if reference == "openmoji" else str(tmp_path / reference)
    root = "data" if name == "openmoji" else tmp_path / "cache"
    images, title, labels = open_reference(name, {}, SIZE, root=root)
    pixels = images if isinstance(images, torch.Tensor) else torch.cat(list(images))
    assert len(pixels) == (2460 if reference == "openmoji" else 2) and title == name and labels is None


# --- captions

def test_several_captions(tmp_path):
    texts = [[f"{word} {k}" for word in ("a", "one", "the")] for k in range(12)]
    rows = [dict(image=encoded(plain(k)), caption=texts[k]) for k in range(12)]
    folder = tmp_path / "f"
    folder.mkdir()
    for k in range(12): (folder / f"{k:02}.png").write_bytes(encoded(plain(k)))
    lines = [json.dumps(dict(file_name=f"{k:02}.png", text=texts[k])) for k in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sources = (write_table(tmp_path / "t.parquet", rows), folder)
    told = [open_data(s, SIZE, tmp_path / "cache", captions=True, seed=seed).take(torch.arange(12))[1]
            for s in sources for seed in (0, 0, 1)]
    assert told[0] == told[1] == told[3] and told[0] != told[2] == told[5]        # of seed and number alone
    for k in range(12): assert all(t[k] in texts[k] for t in told)
    assert len({t.split()[0] for t in told[0]}) == 3


def test_captions_of_every_kind_of_row(tmp_path):
    values = [b"bytes", "text", "", None, "a\ud800b".encode("utf-8", "replace").decode()]
    for column in ("caption", "text", "prompt"):
        kind = pyarrow.binary() if column == "prompt" else pyarrow.string()
        texts = [v if v is None or isinstance(v, bytes) == (column == "prompt") else None for v in values]
        pictures = [encoded(plain(k)) for k in range(5)]
        table = pyarrow.table({"image": pictures, column: pyarrow.array(texts, kind)})
        parquet.write_table(table, tmp_path / f"{column}.parquet")
        data = open_data(tmp_path / f"{column}.parquet", SIZE, tmp_path / "cache", max_bad=1.0, captions=True)
        for k, text in enumerate(texts):
            if text is None:
                with pytest.raises(ValueError, match="no caption"): data.caption(k)
            else: assert data.caption(k) == (text.decode() if isinstance(text, bytes) else text)


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption", ".json", ".png.txt"])
def test_files_beside_a_picture(suffix, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "0.png").write_bytes(encoded(plain(0)))
    content = json.dumps(dict(caption="", text="a dog")) if suffix == ".json" else "a dog"
    (tmp_path / "f" / f"0{suffix}").write_text(content, encoding="utf-8")
    assert open_data(tmp_path / "f", SIZE, tmp_path / "cache", captions=True).caption(0) == "a dog"


def test_no_captions_at_all(tmp_path):
    table = write_table(tmp_path / "t.parquet", [dict(image=encoded(plain(0)), words="x")])
    with pytest.raises(ValueError, match="no captions in .*t.parquet"):
        open_data(table, SIZE, tmp_path / "cache", captions=True)


# --- a run

def test_a_run_says_what_it_left_out_and_what_comes_next(tmp_path, capsys, caplog):
    "From an odd folder to the printed next command, which works."
    from deco import sample as sampling, train as training
    folder = class_folders(tmp_path / "a b" / "x", CLASSES["from 1"])
    (folder / "1" / "z.heic").write_bytes(b"x")
    (folder / "1" / "zz.png").write_bytes(b"no picture")
    out = tmp_path / "a b" / "run"
    places = ("--data", folder, "--data-root", tmp_path / "root", "--out", out)
    assert run(training, "--smoke", *places, "--max-bad", 0.1) == ""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["left_out"] == {".heic": 1, "bad pictures": 1} and "left out of" in caplog.text
    [line] = [line for line in capsys.readouterr().out.splitlines() if "-m deco.sample" in line]
    words = shlex.split(line)[3:]
    assert words[words.index("--classes") + 1] == "1,2,3,4"                        # names, not labels
    assert run(sampling, *words[:-2], "--out", tmp_path / "grid.png", "--num-images", 4, "--steps", 2) == ""
    assert "4 images of 1, 2, 3, 4" in capsys.readouterr().out


@pytest.mark.parametrize("text, labels", [
    ("2", [1]), ("10", [9]), ("0", [0]), ("tench, Tinca tinca", [12]), ("TENCH", [12]), ("dog,2", [13, 1]),
    ("ray, tench, Tinca tinca,dog", [14, 12, 13])])
def test_names_go_before_numbers(text, labels):
    from deco.sample import pick_classes
    classes = [str(k) for k in range(1, 13)] + ["tench, Tinca tinca", "dog", "ray"]
    assert pick_classes(text, classes) == labels


# --- what only looks like something

def test_words_in_the_names_of_classes_are_no_parts(tmp_path, caplog):
    for name in ("bullet train", "test tube"):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "0.png").write_bytes(encoded(plain(0)))
    open_data(tmp_path / "x", SIZE, tmp_path / "cache")
    assert "look like" not in caplog.text


@pytest.mark.parametrize("content, labels, classes", [
    (["cat", "dog", "elk"], [0, 2], ["cat", "dog", "elk"]), (["cat"], [0], ["cat"]),
    (["a", "b"], [None, None], ["all"]), ({"cat": 0}, [0, 2], ["0", "2"]),
    (["x"], ["cow", "ant"], ["ant", "cow"])])
def test_names_beside_shards(content, labels, classes, tmp_path):
    "classes.json names labels that are numbers, and nothing else."
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "classes.json").write_text(json.dumps(content), "utf-8")
    make_tar(tmp_path / "d" / "a.tar", members(0, labels[0]) | members(1, labels[-1] if labels[1:] else 5))
    data = open_data(tmp_path / "d", SIZE, tmp_path / "cache")
    assert data.classes == classes and len(data) == len(labels) and max(data.labels) < len(classes)


def test_metadata_of_another_program(tmp_path, caplog):
    class_folders(tmp_path / "x", CLASSES["numbers"])
    (tmp_path / "x" / "metadata.csv").write_text("isic_id,age\n1,2\n", "utf-8")
    assert len(open_data(tmp_path / "x", SIZE, tmp_path / "cache").classes) == 12
    assert "no file_name" in caplog.text
    (tmp_path / "x" / "metadata.jsonl").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="metadata.jsonl can't be read"):
        open_data(tmp_path / "x", SIZE, tmp_path / "elsewhere")


def test_no_end(tmp_path):
    deep = tmp_path / "x"
    for _ in range(120): deep = deep / "a"
    deep.mkdir(parents=True)
    sources = {"over 100 folders": tmp_path / "x", "give fewer": tmp_path / "{0..99999999}.tar"}
    for word, source in sources.items():
        with pytest.raises(ValueError, match=word): open_data(source, SIZE, tmp_path / "cache")


def test_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch):
    folder = class_folders(tmp_path / "there" / "photos", CLASSES["names"])
    info = dict(train=dict(data="photos", data_root="data", upright=True), source=str(folder))
    for place in ("there", "elsewhere"):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        reference, title, _ = open_reference("data", info, SIZE, root=tmp_path / "cache")
        assert len(torch.cat(list(reference))) == 24 and title == "training data: photos"
    assert not (tmp_path / "elsewhere" / "data").exists()
