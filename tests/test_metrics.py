"Metrics as users meet them: bad input, files, streams, merging. Other codes' values: nbs/20_metrics.ipynb."
import hashlib
import json
import sys
import warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from deco.metrics import (Classifier, compare, evaluate_images, Extractor, image_batches, load_extractor,
                          Moments, reference_statistics, statistics)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A classifier that has learnt nothing."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    state = {k: v.half() if v.is_floating_point() else v for k, v in Classifier(5).state_dict().items()}
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def classifier(weights): return load_extractor("classifier", weights)


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(images, classifier): return statistics(images, classifier)


def complaint(f, *args, error=ValueError) -> str:
    with pytest.raises(error) as e: f(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def nhwc(x): return x.permute(0, 2, 3, 1).numpy()


def test_moments_of_a_stream_do_not_depend_on_its_parts():
    x = torch.randn(500, 7, dtype=torch.float64) + 1e4
    for sizes in ([500], [1] * 500, [0, 3, 497]):
        m = Moments(7)
        for part in x.split(sizes): m.update(part)
        assert m.count == 500 and np.allclose(m.mean, x.mean(0), rtol=1e-13)
        assert np.allclose(m.cov(), np.cov(x.numpy(), rowvar=False), atol=1e-8)
    empty = Moments(7).merge(Moments(7))
    assert empty.count == 0 and torch.equal(empty.merge(m).mean, m.mean)
    assert "at least 2" in complaint(Moments(7).update(x[:1]).cov)


def test_statistics_do_not_depend_on_batches(images, classifier, reference):
    generator = (part for part in images.split([1, 150, 149]))                               # read once
    parts = statistics(generator, classifier, batch_size=64)
    for k, v in reference.items():
        if isinstance(v, torch.Tensor): assert torch.allclose(parts[k], v, atol=1e-4), k
    assert parts["count"] == 300


def test_images_with_faults(images, classifier, reference):
    x = images[:8].float() / 127.5 - 1
    third = torch.arange(8).view(8, 1, 1, 1) == 2
    faults = {"NaN": torch.where(third, torch.nan, x), "to [-1, 1]": images[:8].float(), "empty": images[:0],
              "mixed sizes": [images[:4], images[:4, :, :16, :16]], "(N, 3, H, W)": images[:8, :1],
              "int64": images[:8].long(), "12 x 12": images[:8, :, :8, :8]}
    for word, bad in faults.items(): assert word in complaint(evaluate_images, bad, reference, classifier)
    assert "empty" in complaint(evaluate_images, images, images[:0], classifier)
    assert "empty" in complaint(evaluate_images, iter([]), reference, classifier)
    with pytest.warns(UserWarning, match=r"\[0, 1\]"): list(image_batches(images[:8].float() / 255))


def test_few_images_are_reported(images, classifier, reference):
    with pytest.warns(UserWarning, match="singular"):
        result = evaluate_images(images[:100], reference, classifier)
    assert len(result["notes"]) == 1 and "100 generated images for 128 features" in result["notes"][0]
    assert np.isfinite(result["fid"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate_images(images[:200], reference, classifier)["notes"] == []
    assert "at least 4 images" in complaint(evaluate_images, images[:3], reference, classifier)
    json.dumps(result)


def test_extractors(weights, tmp_path, monkeypatch):
    assert "inception" in complaint(load_extractor, "vgg")
    assert "path" in complaint(load_extractor, "classifier")
    assert "nowhere" in complaint(load_extractor, "classifier", tmp_path / "nowhere", error=FileNotFoundError)
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    for name in ("classifier", "efficientnet-lite0", "inception"):
        assert "junk" in complaint(load_extractor, name, tmp_path / "junk")
    torch.save(Path("."), tmp_path / "code.pth")                    # an object, not weights: refused unopened
    assert "code.pth" in complaint(load_extractor, "inception", tmp_path / "code.pth")
    packages = {"inception": "torch_fidelity", "efficientnet-lite0": "efficientnet_lite_pytorch"}
    for name, package in packages.items():
        for module in [m for m in sys.modules if m.split(".")[0] == package] + [package]:
            monkeypatch.setitem(sys.modules, module, None)
        text = complaint(load_extractor, name, weights, error=ImportError)
        assert "pip install 'deco-diffusion[eval]'" in text


def test_label_names_the_weights(weights):
    "Reports compare extractors by their labels: name and the first digits of the file's SHA-256."
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert load_extractor("classifier", weights).label == f"classifier {digest[:8]}"
    assert load_extractor("efficientnet-lite0").label == "efficientnet-lite0 57934424"


def test_inception_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    def offline(*args, **kwargs): raise OSError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert "no route" in complaint(load_extractor, "inception", error=FileNotFoundError)


def test_npz_of_images(images, tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=nhwc(images))
    got = list(image_batches(tmp_path / "a.npz", 64))
    assert [len(x) for x in got] == [64, 64, 64, 64, 44] and torch.equal(torch.cat(got), images)
    monkeypatch.setattr(np, "load", None)                              # never all at once
    assert len(next(iter(image_batches(tmp_path / "a.npz", 10)))) == 10
    np.savez(tmp_path / "key.npz", images=nhwc(images))
    np.savez(tmp_path / "float.npz", arr_0=nhwc(images) / 255)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:5000])
    for name, word in (("key", "arr_0"), ("float", "uint8"), ("cut", "damaged")):
        assert word in complaint(list, image_batches(tmp_path / f"{name}.npz"))
    assert "nowhere" in complaint(list, image_batches(tmp_path / "nowhere.npz"), error=FileNotFoundError)


def test_reference_cache(images, weights, classifier, tmp_path, monkeypatch):
    cache = tmp_path / "new" / "real.safetensors"
    calls = []
    def counting(x):
        calls.append(len(x))
        return classifier.net(x)
    counted = Extractor(classifier.label, counting)
    first = reference_statistics(images, counted, cache)
    made = len(calls)
    again = reference_statistics(list(images.split(70)), counted, cache)    # the same pixels
    assert len(calls) == made
    for k in ("mu", "sigma", "features", "spectrum"): assert torch.equal(first[k], again[k])
    assert again["count"] == 300
    reference_statistics(images.flip(0), counted, cache)
    assert len(calls) > made, "other pixels"
    made = len(calls)
    newer = Extractor("classifier newer", counted.net)
    assert "newer" in complaint(reference_statistics, cache, newer)    # a file that the user gave
    reference_statistics(images.flip(0), newer, cache)                      # a cache
    assert len(calls) > made, "another extractor"
    cache.write_bytes(cache.read_bytes()[:1000])
    assert "no file of statistics" in complaint(reference_statistics, cache, newer)
    reference_statistics(images, newer, cache)
    assert reference_statistics(cache, newer)["count"] == 300 and not list(cache.parent.glob("*.tmp"))
    assert "generator" in complaint(reference_statistics, iter([images]), counted, cache)
    nowhere = tmp_path / "nowhere.npz"
    assert "nowhere" in complaint(reference_statistics, nowhere, counted, error=FileNotFoundError)


def test_adm_reference(images, classifier, reference, tmp_path):
    moments = {k: reference[k].numpy() for k in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "moments.npz", **moments)
    bare = evaluate_images(images, tmp_path / "moments.npz", classifier)
    assert abs(bare["fid"]) < 1e-4 and abs(bare["sfid"]) < 1e-4
    assert bare["precision"] is bare["spectral_distance_db"] is bare["n_reference"] is None
    np.savez(tmp_path / "both.npz", **moments, arr_0=nhwc(images[:50]))
    both = evaluate_images(images, tmp_path / "both.npz", classifier)
    assert abs(both["fid"]) < 1e-4 and both["recall"] == 1 and both["spectral_distance_db"] > 0
    np.savez(tmp_path / "pool.npz", mu=moments["mu"], sigma=moments["sigma"])
    assert evaluate_images(images, tmp_path / "pool.npz", classifier)["sfid"] is None
    np.savez(tmp_path / "key.npz", mu=moments["mu"], sigmas=moments["sigma"])
    assert "sigma" in complaint(reference_statistics, tmp_path / "key.npz", classifier)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "2048 features" in complaint(evaluate_images, images, tmp_path / "wide.npz", classifier)


def test_statistics_of_two_extractors_do_not_mix(reference):
    assert "use one" in complaint(compare, reference, reference | dict(extractor="inception 6726825d"))


