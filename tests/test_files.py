"Files on the disk as data: broken pictures, broken archives, the index, and batches that depend on nobody."
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import make_tar
from deco import files
from deco.data import batch, image_folder, Images, to_tensor
from deco.datasets import open_data
from deco.files import batches, decode, Files


def picture(k: int, size=(40, 30), mode: str = "RGB") -> Image.Image:
    "A picture that is like no other."
    blocks = np.random.default_rng(k).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path, n: int, classes: str = "ab") -> Path:
    for c in classes: (folder / c).mkdir(parents=True)
    for k in range(n):
        (folder / classes[k * len(classes) // n] / f"{k:03}.png").write_bytes(encoded(picture(k)))
    return folder


@pytest.fixture
def folder(tmp_path): return fill(tmp_path / "images", 20)


def read(tmp_path, content: bytes, size: int = 16) -> np.ndarray:
    (tmp_path / "x.jpg").write_bytes(content)
    return decode(str(tmp_path / "x.jpg"), 0, -1, size).permute(1, 2, 0).numpy()


def close(a, b, by: float = 1):
    return np.abs(np.asarray(a).astype(float) - np.asarray(b).astype(float)).max() <= by


def fingerprint(stream) -> list: return [(k, p.numpy().tobytes(), l.tolist(), bad) for k, p, l, bad in stream]


# --- odd pictures that can be read

def test_modes(tmp_path):
    "At 16 x 16 the crop does nothing, and what comes out is what went in."
    rgb = picture(1, (16, 16))
    a = np.asarray(rgb).astype(float)
    assert np.array_equal(read(tmp_path, encoded(rgb)), a)
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257 + 100
    assert close(read(tmp_path, encoded(Image.fromarray(grey))), grey[:, :, None] / 257, 0.51)
    assert close(read(tmp_path, encoded(Image.fromarray(grey), "TIFF")), grey[:, :, None] / 257, 0.51)
    assert np.array_equal(read(tmp_path, encoded(rgb.convert("L")))[:, :, 1], np.asarray(rgb.convert("L")))
    inks = np.array([[[0, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [255, 0, 0, 128]]], dtype=np.uint8)
    ink = np.tile(inks.repeat(4, 1), (16, 1, 1))
    cmyk = Image.frombytes("CMYK", (16, 16), ink.tobytes())
    seen = read(tmp_path, encoded(cmyk, "JPEG", quality=100, subsampling=0))
    printed = (255 - ink[:, :, :3].astype(float)) * (255 - ink[:, :, 3:].astype(float)) / 255
    assert close(seen, printed, 6)                              # JPEG is lossy
    alpha = np.linspace(0, 255, 256).reshape(16, 16, 1).astype(np.uint8)
    over_white = a * (alpha / 255) + 255 - alpha
    rgba = Image.fromarray(np.concatenate([np.asarray(rgb), alpha], 2))
    assert close(read(tmp_path, encoded(rgba)), over_white)
    assert read(tmp_path, encoded(Image.new("1", (9, 20), 1))).min() == 255


def test_palette_on_white(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 255, 0, 128, 0])
    image.paste(0, (0, 0, 8, 16))
    for kind in ("PNG", "GIF"):
        seen = read(tmp_path, encoded(image, kind, transparency=0))
        assert (seen[:, :8] == 255).all() and (seen[:, 8:] == (0, 128, 0)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (20, 20), c) for c in ("teal", "red", "red")]
    options = dict(lossless=True) if kind == "WEBP" else {}
    seen = read(tmp_path, encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert close(seen, np.broadcast_to((0, 128, 128), seen.shape), 3)


def test_one_pixel(tmp_path):
    assert (read(tmp_path, encoded(Image.new("RGB", (1, 1), (9, 8, 7))), 32) == (9, 8, 7)).all()


# --- pictures that cannot

BOMB = encoded(Image.new("1", (40_000, 40_000)))
BROKEN = {
    "half": encoded(picture(0, (200, 200)), "JPEG")[:900],
    "empty": b"",
    "text": b"<html>not found</html>",
    "bomb": BOMB,
    "sliver": encoded(Image.new("L", (1, 60_000))),
    "half png": encoded(picture(0, (200, 200)))[:900],
    "float": encoded(Image.new("F", (20, 20)), "TIFF"),
    "eps": encoded(picture(0), "EPS"),
    "wide": encoded(Image.new("1", (10_000, 9_000)))}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_is_replaced(kind, folder, tmp_path, caplog):
    bad = folder / "a" / "003.png"
    bad.write_bytes(BROKEN[kind])
    data = Files(folder, 64, tmp_path / "cache", max_bad=0.05)
    pixels, labels = data.take(torch.tensor([2, 3, 4]))
    assert torch.equal(pixels[1], pixels[2]) and not torch.equal(pixels[0], pixels[1])
    assert labels.tolist() == [0, 0, 0]
    assert list(data.bad) == [str(bad)] and str(bad) in caplog.text
    assert "0x" not in caplog.text                              # a reason that does not vary
    assert "\n" not in data.bad[str(bad)] and caplog.text.count(str(bad)) == 1
    data.take(torch.tensor([3]))
    assert caplog.text.count(str(bad)) == 1 and len(data.bad) == 1                                 # said once


def test_bomb_is_not_unpacked(tmp_path):
    import resource
    def memory() -> int: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = memory()
    for content in (BOMB, BROKEN["wide"], BROKEN["sliver"]):
        with pytest.raises((ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)):
            read(tmp_path, content, 256)
    assert len(BOMB) < 300_000
    assert memory() - before < 100_000                          # kB; 90 million pixels are 90 MB at the least


def test_last_is_replaced_by_first(folder, tmp_path):
    (folder / "b" / "019.png").write_bytes(b"")
    data = Files(folder, 16, tmp_path, max_bad=0.05)
    pixels, labels = data.take(torch.tensor([19, 0]))
    assert torch.equal(pixels[0], pixels[1]) and labels.tolist() == [0, 0]   # the label goes with the picture


# --- when a run stops

def test_one_of_two(tmp_path):
    fill(tmp_path / "two", 2)
    (tmp_path / "two" / "b" / "001.png").write_bytes(b"")
    with pytest.raises(ValueError, match="b/001.png") as e:
        list(batches(Files(tmp_path / "two", 16, tmp_path), 0, 0, 8, 2))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("n, bad, stops", [
    (8, 1, True), (99, 1, True), (100, 1, False),
    (10_000, 1, False), (10_000, 100, False), (10_000, 101, True)])
def test_share(n, bad, stops, folder, tmp_path):
    "Whatever is tried when they are met, and however often."
    data = Files(folder, 16, tmp_path)
    data.table = data.table[:1].expand(n, 6)
    met = [(f"{k}.jpg", "broken") for k in range(bad)]
    if stops:
        with pytest.raises(ValueError, match=f"bad pictures: {bad}, .*0.jpg"): data.count(8, met)
    else:
        for _ in range(50): data.count(8, met)


def test_large_sets_do_not_wait(folder, tmp_path):
    data = Files(folder, 16, tmp_path)
    data.table = data.table[:1].expand(1_000_000, 6)
    data.count(200_000, [(f"{k}.jpg", "") for k in range(1900)])
    with pytest.raises(ValueError): data.count(10, [(f"{k}.jpg", "") for k in range(1900, 2101)])


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable(tmp_path, workers):
    "One line also from a worker, and it names files."
    (tmp_path / "rotten").mkdir()
    for k in range(4): (tmp_path / "rotten" / f"{k}.jpg").write_bytes(b"no")
    data = Files(tmp_path / "rotten", 16, tmp_path)
    with pytest.raises(ValueError, match="rotten/.*mend") as e:
        list(batches(data, 0, 0, 8, 4, workers=workers))
    assert "\n" not in str(e.value) and "Traceback" not in str(e.value)


@pytest.mark.parametrize("name, size, error", [
    ("nowhere", 16, "no .*nowhere: give"),
    ("empty", 16, "no image in .*empty"),
    ("images", 0, "size must be"),
    ("x-{000..001}.tar", 16, "no .*x-000.tar: give"),
    ("x-*.tar", 16, "no .*x-.*tar: give"),
    ("bare.tar", 16, "no image in .*bare.tar"),
    ("pictures.zip", 16, "pictures.zip is no folder and no .tar: unpack it")])
def test_errors(name, size, error, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    make_tar(tmp_path / "bare.tar", {"readme.md": b"hello"})
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    with pytest.raises((ValueError, OSError), match=error) as e:
        open_data(str(tmp_path / name), size, tmp_path / "cache")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "cache").exists()


# --- the index

def test_folder_is_as_in_memory(folder, tmp_path):
    (folder / "b" / "deeper").mkdir()
    (folder / "b" / "deeper" / "z.JPEG").write_bytes(encoded(picture(99), "JPEG"))
    (folder / "notes.txt").write_text("no picture", "utf-8")
    (folder / "top.webp").write_bytes(encoded(picture(98), "WEBP"))
    os.rename(folder / "a" / "000.png", folder / "a" / os.fsdecode(b"\xff\xc3\xa9 .png"))          # not UTF-8
    lazy, eager = Files(folder, 16, tmp_path), image_folder(folder, 16)
    for data in (lazy, Files(folder, 16, tmp_path)):                              # listed, and from the cache
        pixels, labels = data.take(torch.arange(22))
        assert len(data) == 22 and data.classes == eager.classes == ["a", "all", "b"]
        assert torch.equal(pixels, eager.pixels) and torch.equal(labels, eager.labels) and data.can_flip.all()


def test_index_is_kept(folder, tmp_path, monkeypatch):
    listed = []
    real = files.build_index
    monkeypatch.setattr(files, "build_index", lambda *args: listed.append(args) or real(*args))
    first = Files(folder, 16, tmp_path / "cache")
    assert len(Files(str(folder) + "/", 8, tmp_path / "cache")) == 20 and len(listed) == 1  # not listed again
    (folder / "b" / "new.png").write_bytes(encoded(picture(77)))
    data = Files(folder, 16, tmp_path / "cache")
    assert len(data) == 21 and len(first) == 20 and len(listed) == 2 and data.path(20).endswith("new.png")
    (folder / "a" / "000.png").unlink()
    assert len(Files(folder, 16, tmp_path / "cache")) == 20 and len(listed) == 3
    fill(folder / "b" / "sub", 2)
    assert len(Files(folder, 16, tmp_path / "cache")) == 22 and len(listed) == 4    # found below a class, too
    [cache] = (tmp_path / "cache").iterdir()                                     # one file, nothing temporary
    cache.write_bytes(cache.read_bytes()[:100])
    assert len(Files(folder, 16, tmp_path / "cache")) == 22 and len(listed) == 5
    Files(fill(tmp_path / "other", 4), 16, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2 and len(listed) == 6


def test_index_is_small(tmp_path):
    groups = [f"n{k // 1300:08}" for k in range(100_000)]
    rows = ((f"{group}/{group}_{k:06}.JPEG", group, 0, 0, -1) for k, group in enumerate(groups))
    names, table, _, classes, _ = files.build_index(rows, [])
    start, end, label, *_ = table[99_999].tolist()
    assert names.nbytes + table.nbytes < 85 * 100_000
    assert bytes(names[start:end].tolist()) == b"n00000076/n00000076_099999.JPEG"
    assert label == 76 == len(classes) - 1


# --- tar shards

def samples(first: int, n: int) -> dict[str, bytes]:
    "Members of a shard: n pictures, each with its class."
    members = {}
    for k in range(first, first + n):
        members |= {f"{k:04}.png": encoded(picture(k)), f"{k:04}.cls": str(k % 3).encode()}
    return members


def test_shards(tmp_path, caplog):
    for s in range(3): make_tar(tmp_path / "tars" / f"x-{s:03}.tar", samples(10 * s, 10))
    sizes = {"tars": 30, "tars/x-*.tar": 30, "tars/x-{000..001}.tar": 20, "tars/x-001.tar": 10}
    for source, n in sizes.items():
        data = open_data(tmp_path / source, 16, tmp_path / "cache")
        assert len(data) == n and data.classes == ["0", "1", "2"] and not caplog.text
    data = Files(tmp_path / "tars", 16, tmp_path / "cache")
    pixels, labels = data.take(torch.tensor([29, 0, 13, 13]))                            # in any order
    for row, k in zip(pixels, (29, 0, 13, 13)):
        assert torch.equal(row, decode_bytes(tmp_path, encoded(picture(k))))
    assert labels.tolist() == [2, 0, 1, 1]
    make_tar(tmp_path / "tars" / "x-003.tar", samples(30, 5))
    assert len(Files(tmp_path / "tars", 16, tmp_path / "cache")) == 35                   # a new shard is seen
    make_tar(tmp_path / "tars" / "x-003.tar", samples(30, 7))
    assert len(Files(tmp_path / "tars", 16, tmp_path / "cache")) == 37                   # and a changed one


def decode_bytes(tmp_path, content):
    (tmp_path / "one").write_bytes(content)
    return decode(str(tmp_path / "one"), 0, -1, 16)


def test_labels(tmp_path, caplog):
    image = encoded(picture(0))
    def labels(members):
        caplog.clear()
        path = make_tar(tmp_path / "t.tar", members | {f"{k}.png": image for k in "abcd"})
        data = Files(path, 16, tmp_path / "cache")
        left_out = data.left_out.get("without a label", 0)
        assert not left_out or f"{left_out} without a label" in caplog.text
        return data.classes, data.take(torch.arange(len(data)))[1].tolist(), left_out
    assert labels({}) == (["all"], [0, 0, 0, 0], 0)
    numbers = {"a.cls": b"3\n", "b.cls": b"0", "c.cls": b"1", "d.cls": b"1"}
    assert labels(numbers) == (["0", "1", "3"], [2, 0, 1, 1], 0)                 # as folders of these names
    words = {"a.cls": b"dog", "b.cls": b"cat", "c.cls": b"dog"}                         # d has none: left out
    assert labels(words) == (["cat", "dog"], [1, 0, 1], 1)
    in_json = {"a.json": b'{"label": 1}', "b.json": b'{"label": "0"}', "c.json": b"2", "d.json": b"{not json"}
    assert labels(in_json) == (["0", "1"], [1, 0], 2)
    odd = {"a.cls": b"1", "b.cls": b"0", "c.cls": b"\xff", "d.cls": b"-1"}
    assert labels(odd) == (["0", "1"], [1, 0], 2)
    assert labels(odd | {"d.cls": b"99999"}) == (["0", "1", "99999"], [1, 0, 2], 1)     # no 100,000 classes
    null = {"a.json": b'{"label": null}', "b.json": b'{"label": "cat"}', "c.json": b'{"label": true}'}
    assert labels(null) == (["cat"], [0], 3)
    first = {"a.json": b'{"width": 3}', "a.cls": b"cat", "b.json": b'{"label": "cow"}', "b.cls": b"dog"}
    assert labels(first) == (["cat", "dog"], [0, 1], 2)                          # .json may stand before .cls
    assert labels({"a.CLS": b"cat", "b.JSON": b'{"label": "dog"}'}) == (["cat", "dog"], [0, 1], 2)


@pytest.mark.parametrize("keep", [0, 100, 512, 3000, 0.5, 0.8])
def test_cut_tar(keep, tmp_path, caplog):
    "What is whole is there; the picture that was cut is replaced like any broken one."
    make_tar(tmp_path / "t" / "a.tar", samples(0, 10))
    cut = tmp_path / "t" / "b.tar"
    content = make_tar(cut, samples(10, 10)).read_bytes()
    content = content[:int(keep * len(content)) if isinstance(keep, float) else keep]
    cut.write_bytes(content)
    data = Files(tmp_path / "t", 16, tmp_path / "cache", max_bad=0.1)
    whole = [k for k in range(10, 20) if encoded(picture(k)) in content]
    left = len(data) - 10
    assert len(whole) - 1 <= left <= len(whole) + 1                              # one may have lost its label
    pixels, _ = data.take(torch.arange(len(data)))
    both = min(left, len(whole))
    assert all(torch.equal(pixels[k], decode_bytes(tmp_path, encoded(picture(k)))) for k in range(10 + both))
    assert len(data.bad) == left - both and f"{cut} (" in caplog.text and "a.tar" not in caplog.text


def test_odd_members(tmp_path, caplog):
    image = encoded(picture(0))
    path = make_tar(tmp_path / "t.tar", {
        "../up.png": image, "../up.cls": b"0", "/root.png": image, "._fine.png": b"mac",
        "d/fine.png": image, "d/fine.cls": b"0", "d/other.cls": b"0", "d/rot.png": b"rot", "d/rot.cls": b"0"})
    with tarfile.open(path, "a") as tar:
        for name, to in (("link.png", "/etc/passwd"), ("link.cls", "/etc/passwd")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, to
            tar.addfile(link)
    data = Files(path, 16, tmp_path / "cache")
    assert [data.path(k) for k in range(len(data))] == [f"{path}/d/fine.png", f"{path}/d/rot.png"]
    assert data.left_out == {"members whose path leads out of the archive": 3, "links in tars": 2,
                             "hidden members": 1, "samples without a picture": 1}
    for count in ("3 members whose path leads out", "2 links", "1 hidden"): assert count in caplog.text
    with pytest.raises(ValueError, match="t.tar/d/rot.png"): data.take(torch.arange(2))
    assert {p.name for p in tmp_path.iterdir()} == {"t.tar", "cache"}                   # nothing was unpacked
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b\x08" + bytes(range(256)) * 9)
    with pytest.raises(ValueError, match="zipped.tar is compressed .gzip.*unpack"):
        Files(tmp_path / "zipped.tar", 16, tmp_path / "cache")


def test_tars_beside_folders_are_not_shards(folder, tmp_path):
    make_tar(folder / "a.tar", samples(0, 3))
    assert len(Files(folder, 16, tmp_path)) == 20
    (tmp_path / "tars" / ".cache").mkdir(parents=True)                                # what downloaders leave
    make_tar(tmp_path / "tars" / "a.tar", samples(0, 3))
    assert len(Files(tmp_path / "tars", 16, tmp_path)) == 3


# --- batches

@pytest.fixture(params=["memory", "folder", "tar"])
def data(request, folder, tmp_path):
    if request.param == "memory": return image_folder(folder, 16)
    (folder / "a" / "005.png").write_bytes(b"")
    if request.param == "folder": return Files(folder, 16, tmp_path / "cache", max_bad=0.05)
    path = make_tar(tmp_path / "t.tar", samples(0, 13) | {"0004.png": b""})
    return Files(path, 16, tmp_path / "cache", max_bad=0.1)


def test_workers_change_nothing(data):
    state = torch.get_rng_state()
    alone = fingerprint(batches(data, 3, 0, 56, 8))
    assert alone == fingerprint(batches(data, 3, 0, 56, 8, workers=2))
    assert [k for k, *_ in alone] == list(range(0, 56, 8))
    for k, p, l, bad in batches(data, 3, 0, 56, 8):
        pixels, labels, _ = batch(data, 3, k, 8)
        assert torch.equal(p, pixels) and torch.equal(l, labels)
        assert p.dtype == torch.uint8 and l.dtype == torch.int64
    replaced = [row for *_, bad in alone for row in bad]
    assert len(replaced) in ([0] if isinstance(data, Images) else [2, 3, 4, 5])
    for path, reason in replaced: assert path.endswith(".png") and reason
    assert torch.equal(state, torch.get_rng_state()) and not multiprocessing.active_children()


def test_slices_are_the_batch(data):
    whole = list(batches(data, 0, 0, 48, 8))
    front = list(batches(data, 0, 0, 48, 8, first=0, count=4))
    back = list(batches(data, 0, 0, 48, 8, first=4, count=4, workers=2))
    for (k, p, l, bad), (k0, p0, l0, bad0), (k1, p1, l1, bad1) in zip(whole, front, back, strict=True):
        assert k == k0 == k1 and bad == bad0 + bad1
        assert torch.equal(p, torch.cat([p0, p1])) and torch.equal(l, torch.cat([l0, l1]))
    assert fingerprint(batches(data, 0, 16, 48, 8)) == fingerprint(whole[2:])                 # taken up later
    assert torch.equal(next(batches(data, 0, 0, 8, 8, first=5))[1], whole[0][1][5:])


@pytest.mark.parametrize("first, count", [(-1, 2), (0, 9), (6, 3), (8, None), (0, 0)])
def test_no_such_slice(first, count, folder):
    with pytest.raises(ValueError, match="in 8"):
        next(batches(image_folder(folder, 8), 0, 0, 8, 8, first, count))


def test_order_is_what_it_was():
    "Numbers written down before the order was kept per pass: runs that were begun go on as they would have."
    pixels = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 1, 2).clone()
    pixels[..., 1] += 100
    images = Images(pixels, torch.arange(10), list("0123456789"), [""] * 10, torch.arange(10) % 3 > 0)
    p, labels, _ = batch(images, 3, 7, 20)
    assert labels.tolist() == [3, 5, 2, 8, 1, 5, 7, 0, 9, 2, 3, 4, 6, 8, 9, 1, 0, 2, 3, 7]
    mirrored = (p[:, 0, 0, 0] >= 100).nonzero().flatten()
    assert mirrored.tolist() == [2, 5, 11, 13]


def test_flip(folder, tmp_path, monkeypatch):
    from deco.datasets import NAMED, Named
    assert Files(folder, 16, tmp_path).can_flip.all()
    assert not Files(folder, 16, tmp_path, flip=False).can_flip.any()
    few = image_folder(folder, 16)
    monkeypatch.setitem(NAMED, "openmoji", Named(lambda size, root: few, 2))
    assert open_data("openmoji", 16) is few and few.can_flip.all()
    assert not open_data("openmoji", 16, flip=False).can_flip.any()


def test_workers_ignore_signals(folder, tmp_path):
    "Ctrl-C in a terminal reaches the workers too; closing the stream ends them."
    stream = batches(Files(folder, 16, tmp_path), 0, 0, 800, 8, workers=2)
    expected = fingerprint(batches(Files(folder, 16, tmp_path), 0, 0, 800, 8))
    got = [next(stream), next(stream)]     # one of each worker: both are past their start, and ignore signals
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for p in workers:
        for s in (signal.SIGINT, signal.SIGTERM): os.kill(p.pid, s)
    got += list(stream)
    assert fingerprint(got) == expected
    stream = batches(Files(folder, 16, tmp_path), 0, 0, 800, 8, workers=2)
    next(stream)
    stream.close()
    assert not multiprocessing.active_children()


def test_exit_without_closing(folder, tmp_path):
    "Workers ignore the SIGTERM that Python sends at its end. One process ends by itself, one is stopped."
    code = f"""
import os
from deco.files import batches, Files
other = os.fork()
stream = batches(Files({str(folder)!r}, 16, {str(tmp_path)!r}), 0, 0, 80_000, 8, workers=2)
next(stream)
if other:
    print(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]), flush=True)
    raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert (done.stdout, done.returncode) == ("0\n", -signal.SIGINT), done.stderr


class Threads(Images):
    def targets(self, i): return torch.full((len(i),), torch.get_num_threads())


def test_one_thread_per_worker(folder):
    images = Threads(**vars(image_folder(folder, 16)))
    assert all((labels == 1).all() for _, _, labels, _ in batches(images, 0, 0, 32, 8, workers=2))


class Deadly(Images):
    def read(self, i): os.kill(os.getpid(), signal.SIGKILL)


def test_dead_worker(folder):
    "The kernel kills who takes too much memory."
    images = image_folder(folder, 16)
    with pytest.raises(ValueError, match="worker") as e:
        list(batches(Deadly(**vars(images)), 0, 0, 80, 8, workers=1))
    assert "\n" not in str(e.value)


def test_workers_share_the_set():
    "What is in memory is not copied into the workers."
    if not Path("/proc/self/smaps_rollup").exists(): pytest.skip("needs Linux")
    n = 30_000
    pixels = torch.ones(n, 3, 32, 32, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(n, dtype=torch.long), ["a"], [], torch.ones(n, dtype=torch.bool))
    stream = batches(images, 0, 0, n, 100, workers=2)
    for _ in range(250): next(stream)
    for p in multiprocessing.active_children():
        lines = Path(f"/proc/{p.pid}/smaps_rollup").read_text("utf-8").splitlines()
        private = sum(int(line.split()[1]) for line in lines if line.startswith("Private"))         # kB
        assert private * 1024 < images.pixels.nbytes / 2
    stream.close()


def test_mpo(tmp_path):
    "What many phones write: a JPEG with a second one behind it."
    a, b = picture(1, (16, 16)), picture(2, (16, 16))
    content = encoded(a, "MPO", save_all=True, append_images=[b], quality=100)
    with Image.open(io.BytesIO(content)) as image: first = to_tensor(image.convert("RGB"))
    assert torch.equal(first, decode_bytes(tmp_path, content))
