"Captions of every kind, good and bad, in tars, folders and parquet files."
import io
import json
import pytest
import torch
from PIL import Image
import deco.captions as captions
from conftest import make_tar, run
from deco import train as training
from deco.captions import caption, Captioned
from deco.datasets import examples, open_data
from deco.files import batches

GOOD = {"a.jpg": "red", "b.png": "green", "c.webp": "blue"}
BAD = {                                                      # what the log says: kind of file and its content
    "no caption": ("txt", None),
    "not UTF-8": ("txt", b"\xff\xfe\xfa"),
    "not JSON": ("json", b"{oops"),
    "without a caption": ("json", b'{"label": 3}'),
    "more than 1 MB": ("txt", b"x" * (2**20 + 1))}


def picture(colour: str, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 24), colour).save(buffer, kind)
    return buffer.getvalue()


def samples(kind: str) -> dict[str, bytes]:
    "Three pictures, each with a caption of this kind."
    members = {}
    for name, colour in GOOD.items():
        key, suffix = name.split(".")
        text = f"a {colour} picture"
        members[name] = picture(colour, suffix.replace("jpg", "jpeg"))
        members[f"{key}.{kind}"] = (text if kind == "txt" else json.dumps({"caption": text})).encode()
    return members


def numbered(key: str, text: str) -> dict[str, bytes]:
    "A red picture with a caption."
    return {f"{key}.jpg": picture("red"), f"{key}.txt": text.encode()}


def check(data):
    pixels, texts = data.take(torch.arange(len(data)))
    assert sorted(texts) == ["a blue picture", "a green picture", "a red picture"]
    channels = {"red": 0, "green": 1, "blue": 2}
    for image, text in zip(pixels, texts):                      # each has its own
        assert image.float().mean((1, 2)).argmax() == channels[text.split()[1]]


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_shards(kind, tmp_path):
    check(open_data(make_tar(tmp_path / "x.tar", samples(kind)), 16, tmp_path / "cache", captions=True))


def test_txt_goes_before_json(tmp_path):
    both = samples("json") | {k: v for k, v in samples("txt").items() if k.endswith("txt")}
    both["a.json"] = b'{"caption": "something else"}'
    check(open_data(make_tar(tmp_path / "x.tar", both), 16, tmp_path, captions=True))


def test_folders(tmp_path):
    for name, data in samples("txt").items():
        (tmp_path / "photos" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / ("sub" if name[0] == "a" else ".") / name).write_bytes(data)
    check(open_data(tmp_path / "photos", 16, tmp_path / "cache", captions=True))


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet(as_struct, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [picture(c) for c in GOOD.values()]
    table = pa.table(dict(image=[dict(bytes=p, path="x.jpg") for p in pictures] if as_struct else pictures,
                          text=[f"a {c} picture" for c in GOOD.values()]))
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "0.parquet")
    for source in (tmp_path / "set", tmp_path / "set" / "0.parquet", tmp_path / "set" / "*.parquet"):
        check(open_data(source, 16, tmp_path / "cache", captions=True))
    for n in "ab":
        (tmp_path / "sets" / n).mkdir(parents=True)
        pq.write_table(table, tmp_path / "sets" / n / "0.parquet")
    both = open_data(tmp_path / "sets" / "*" / "0.parquet", 16, tmp_path / "cache", captions=True)
    assert len(both) == 2 * len(GOOD)
    pq.write_table(pa.table(dict(pixels=[1])), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, reason in (("other", "has the columns pixels"), ("broken", "no parquet file")):
        with pytest.raises(ValueError, match=reason):
            open_data(tmp_path / f"{name}.parquet", 16, tmp_path / "cache", captions=True)
    holes = dict(image=[pictures[0], None, pictures[2]], text=["a red picture", "nothing", None])
    pq.write_table(pa.table(holes), tmp_path / "holes.parquet")
    data = open_data(tmp_path / "holes.parquet", 16, tmp_path / "cache", max_bad=1.0, captions=True)
    assert len(data) == 2 and data.take(torch.arange(2))[1] == ["a red picture"] * 2
    assert "no caption" in str(data.bad)


@pytest.mark.parametrize("reason", BAD)
def test_bad_captions_are_replaced_and_counted(reason, tmp_path, caplog):
    members = samples("txt") | {"d.jpg": picture("red")}
    kind, content = BAD[reason]
    if content is not None: members[f"d.{kind}"] = content
    data = open_data(make_tar(tmp_path / "x.tar", members), 16, tmp_path, max_bad=0.5, captions=True)
    texts = data.take(torch.arange(4))[1]
    assert texts[3] == texts[0] and len(data.bad) == 1 and reason in str(data.bad) and "d.jpg" in caplog.text
    strict = open_data(tmp_path / "x.tar", 16, tmp_path, max_bad=0.1, captions=True)
    with pytest.raises(ValueError, match=r"bad pictures: 1, .*d.jpg"): strict.take(torch.arange(4))
    assert len(list(data.captions)) == 3


def test_lines_and_letters():
    assert caption("\ufeff a red\r\n\theart\u0000 ".encode()) == "a red heart"
    assert caption("红色的心 ♥".encode()) == "红色的心 ♥"
    assert caption(b"") == "" == caption(b'{"caption": ""}', "json")
    for deep in (b"[" * 100_000, b'{"caption": 3}', b"[]", b"null"):
        with pytest.raises(ValueError): caption(deep, "json")


def test_damaged_shards(tmp_path, caplog):
    "A shard that is cut gives the samples that are whole; one that is none is an error that names it."
    path = make_tar(tmp_path / "x.tar", samples("txt"))
    whole = path.read_bytes()
    path.write_bytes(whole[:whole.index(b"a blue picture")])
    data = open_data(path, 16, tmp_path, max_bad=1.0, captions=True)
    assert set(data.take(torch.arange(len(data)))[1]) <= {"a red picture", "a green picture"}
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(FileNotFoundError, match="y.tar"):
        open_data(tmp_path / "y.tar", 16, tmp_path, captions=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_data(tmp_path / "nowhere.tar", 16, tmp_path, captions=True)


def test_ranks_and_workers_share_all_and_nothing_twice(tmp_path):
    keys = [f"{s}{k}" for s in range(3) for k in range(4)]
    for s in "012":
        members = {}
        for key in keys:
            if key[0] == s: members |= numbered(key, key)
        make_tar(tmp_path / f"{s}.tar", members)
    data = open_data(str(tmp_path / "{0..2}.tar"), 8, tmp_path, captions=True)
    ways = {}
    for workers in (0, 2):
        streams = [batches(data, 0, 0, 24, 6, 3 * rank, 3, workers) for rank in (0, 1)]
        ways[workers] = [a[2] + b[2] for a, b in zip(*streams)]
    assert ways[0] == ways[2]
    for epoch in (ways[0][:2], ways[0][2:]):
        assert sorted(sum(epoch, [])) == keys


def test_offsets_are_kept_in_a_file(tmp_path, monkeypatch):
    path, cache = make_tar(tmp_path / "x.tar", samples("txt")), tmp_path / "cache"
    open_data(path, 16, cache, captions=True)
    monkeypatch.setattr(captions, "_caption_offsets", lambda shard: pytest.fail("read again"))
    check(open_data(path, 16, cache, captions=True))


def test_examples(tmp_path):
    content = samples("txt") | {"d.jpg": picture("red")}
    data = Captioned(make_tar(tmp_path / "x.tar", content), 16, tmp_path)
    texts = examples(data, 8)
    assert set(texts) == {"a red picture", "a green picture", "a blue picture"} and len(texts) == 8


def test_a_run_on_shards(tmp_path):
    "From tars with an empty and a missing caption to a run that says what it met, and is taken up again."
    members = {}
    for k in range(8): members |= numbered(str(k), "" if k == 3 else f"red number {k}")
    make_tar(tmp_path / "x.tar", members | {"9.jpg": picture("blue")})
    command = ["--smoke", "--text", "minilm", "--data", tmp_path / "x.tar", "--data-root", tmp_path / "data",
               "--max-bad", 0.5, "--out", tmp_path / "run"]
    assert run(training, *command, "--workers", 2) == ""
    assert run(training, *command, "--images", 96, "--text-cache", 0) == ""
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()[-1])
    assert row["images"] == 96 and row["captions"]["empty"] >= 1
    assert "no caption" in run(training, *command[:-3], "0.01", "--out", tmp_path / "strict")
