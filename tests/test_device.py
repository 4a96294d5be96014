"As a GPU would see it: graphs, copies and waits, counted on the CPU; the draws are the same everywhere."
import math
import platform
import threading
from contextlib import contextmanager
import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from conftest import apart
import deco
from deco import sample as sampling
from deco import train as training
from deco.config import Config
from deco.core import _constant
from deco.flow import sample
from deco.repa import Projector
from deco.train import losses, noise_times_coins, Objective, total_loss


# --- compile: one graph for all blocks and one for the head, no break, and none anew after the first calls

def compiled(name: str, **arguments):
    "A model with values, its parts compiled, without the minutes of a C++ compiler."
    dynamo.reset()
    counters.clear()
    if name.startswith("deco"): arguments = arguments | dict(decoder_depth=1)          # all layers are alike
    model = deco.create(name, **arguments)
    for p in model.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.02)
    for part in (*model.blocks, model.head): part.compile(backend="aot_eager", fullgraph=True)
    return model


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


CLASSES = dict(num_classes=10)
TEXT = dict(text_width=8, text_length=6, text_depth=1)

@pytest.mark.parametrize("name, precision, arguments", [
    ("deco-tiny", "float32", CLASSES), ("deco-tiny", "bf16", CLASSES), ("dit-tiny", "float32", CLASSES),
    ("deco-tiny", "bf16", CLASSES | dict(recompute="cheap")),
    ("deco-tiny", "float32", CLASSES | dict(recompute="blocks")), ("deco-tiny", "float32", TEXT)])
def test_training_compiles_once(name, precision, arguments):
    model = compiled(name, **arguments)
    objective = Objective(model)
    cfg = Config(model=name, precision=precision)
    null = model.blank(1)[0]
    for step in range(4):
        pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        y = torch.randn(4, 6, 8) if model.has_text else torch.randint(0, 10, (4,))
        parts, _ = losses(objective, pixels, y, noise_times_coins(cfg, 4 * step, pixels.shape), cfg, null)
        total_loss(parts, cfg).backward()
        assert graphs() == 2


@pytest.mark.parametrize("arguments", [CLASSES, TEXT])
def test_drawing_compiles_at_first(arguments):
    model = compiled("deco-tiny", **arguments)
    def draw(size, guidance):
        y = torch.randn(2, 6, 8) if model.has_text else torch.tensor([1, 2])
        null = torch.zeros(6, 8) if model.has_text else None
        sample(model, torch.randn(2, 3, *size), y, steps=3, guidance=guidance, null=null)
    def all_kinds():
        for size in ((32, 32), (32, 48)):
            for guidance in (1.0, 3.0): draw(size, guidance)
    all_kinds()
    warm = graphs()
    all_kinds()
    assert graphs() == warm


def test_compiling_needs_whole_graphs():
    "`compile_parts` asks for them: a break is an error and no slow run."
    model = deco.create("deco-tiny", num_classes=10)
    asked = []
    for part in (*model.blocks, model.head): part.compile = lambda **how: asked.append(how)
    deco.model.compile_parts(model)
    assert asked == [dict(fullgraph=True)] * (len(model.blocks) + 1)


def test_no_compiler_is_said_in_a_line(monkeypatch):
    model = deco.create("deco-tiny", num_classes=10)
    monkeypatch.setattr(deco.model.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs a C.. compiler.*--no-compile"):
        deco.model.compile_parts(model)
    monkeypatch.setattr(deco.model, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs Triton"):
        deco.model._check_compiler(torch.device("cuda"))


def test_drawing_compiles_where_it_draws(monkeypatch):
    "The model and the weaker one, each after it has come to its device."
    seen = []
    monkeypatch.setattr(sampling, "compile_parts", lambda m: seen.append(next(m.parameters()).device.type))
    monkeypatch.setattr(sampling, "pick_device", lambda name: "meta")
    prepared = sampling.prepare(sampling.Sampling(run="openmoji-toy", weak="openmoji-toy", compile=True))
    assert seen == ["meta", "meta"] and prepared.solver["weak"] is not None


# --- copies and waits: the loss on tensors that claim to lie on a GPU

class Crossings(TorchDispatchMode):
    "What goes from one device to another, and what is read as a number, by the name of the operation."
    def __init__(self):
        super().__init__()
        self.names = []
        self.launches = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        kinds = [{t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor) and t.ndim}
                 for x in ((args, kwargs or {}), out)]
        crossed = kinds[0] and kinds[1] and kinds[0] != kinds[1]
        if crossed or "local_scalar" in str(f): self.names.append(str(f))
        self.launches += "cuda" in kinds[1]
        return out


@contextmanager
def fake_gpu():
    "Tensors made on 'cuda' exist without a GPU, and without values. Constants made here are forgotten after."
    try:
        with FakeTensorMode(allow_non_fake_inputs=True): yield torch.device("cuda")
    finally: _constant.cache_clear()


def fake_step(gpu, cfg: Config, crossings: Crossings, objective: Objective, teacher=None) -> None:
    "The losses of a batch, as in a training step after the first."
    B = 4
    with gpu:
        pixels, y = torch.zeros(B, 3, 32, 32, dtype=torch.uint8), torch.zeros(B, dtype=torch.long)
        draws = torch.empty(B, 3, 32, 32), torch.empty(B), torch.empty(B)
    losses(objective, pixels, y, draws, cfg, 10, teacher)               # the first makes the constants
    with crossings: losses(objective, pixels, y, draws, cfg, 10, teacher)


@pytest.mark.parametrize("changed", [dict(), dict(freq_quality=50)])
def test_nothing_is_copied_to_the_gpu_in_a_step(changed):
    crossings = Crossings()
    with fake_gpu() as gpu:
        with gpu: objective = Objective(deco.create("deco-tiny", num_classes=10), Projector(64, 8), 1)
        def teacher(pixels): return torch.zeros(4, 16, 8, device="cuda")
        fake_step(gpu, Config(**changed), crossings, objective, teacher)
    assert not crossings.names and crossings.launches > 50


def test_a_copy_would_be_seen():
    "The mode above does catch a constant that is made anew."
    crossings = Crossings()
    with fake_gpu() as gpu:
        with gpu: objective = Objective(deco.create("deco-tiny", num_classes=10))
        kept = deco.dct.constant
        deco.dct.constant = lambda make, *args, device: make(*args).to(device)
        try: fake_step(gpu, Config(), crossings, objective)
        finally: deco.dct.constant = kept
    assert len(crossings.names) == 3                                     # colours, transform, weights


def test_a_step_waits_once():
    "What a step reports comes to the CPU in one copy."
    crossings = Crossings()
    with fake_gpu() as gpu:
        with gpu: parts = dict(mse=torch.ones(()), freq=torch.ones(()))
        with gpu: detail, norm = torch.ones(2, 8), torch.ones(())
        with crossings:
            try: training._reduce_stats(parts, detail, norm, False)
            except Exception: pass                                       # fake numbers can't be looked at
    assert crossings.names == ["aten._to_copy.default"]


def test_decoder_in_slices_of_a_gpu(monkeypatch):
    "Slices change nothing, whatever their size and whether they are computed again."
    torch.manual_seed(0)
    plain, again = (deco.create("deco-tiny", num_classes=10, recompute=mode) for mode in ("none", "cheap"))
    for p in plain.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.02)
    again.load_state_dict(plain.state_dict())
    x, t, y = torch.randn(3, 3, 32, 32), torch.rand(3), torch.tensor([1, 2, 3])
    want = plain(x, t, y)
    want.square().mean().backward()
    for size in (2**6, 2**10, 2**18):
        like_gpu = deco.core.Traits(True, size, torch.float32, "gloo")
        monkeypatch.setattr(deco.decoder, "traits", lambda device: like_gpu)
        again.zero_grad()
        v = again(x, t, y)
        v.square().mean().backward()
        assert torch.allclose(v, want, atol=1e-6)
        for p, q in zip(plain.parameters(), again.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)


# --- devices

@pytest.mark.parametrize("local_rank", ["", "0", "3"])
def test_every_process_names_its_gpu(local_rank, monkeypatch):
    "Also the only one of torchrun: torch.cuda.set_device wants an index."
    monkeypatch.setattr(torch, "zeros", lambda *args, **settings: torch.ones(1))
    if local_rank: monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert deco.core.pick_device("cuda") == f"cuda:{local_rank or 0}"
    assert deco.core.pick_device("cuda:1") == "cuda:1" and deco.core.pick_device("cpu") == "cpu"


def test_the_message_names_what_was_asked():
    with pytest.raises(ValueError, match="--device cuda:77 is not to be had"):
        deco.core.pick_device("cuda:77")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_norm_is_not_rounded(dtype):
    "Also of a bf16 tensor without autocast: 2^-9 off would be the scale of a whole token."
    x = torch.randn(5, 96, dtype=dtype)
    got = deco.dit.RMSNorm(96).inverse(x)
    want = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(got.double(), want, rtol=1e-6)


def test_derivative_of_a_norm_and_rotation():
    "Written by hand: beside differences, and beside the plain formula's that a compiler gets."
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    norm = deco.dit.RMSNorm(8).double()
    torch.nn.init.normal_(norm.weight)
    rope = [z.double() for z in deco.dit.rope_table((2, 3), 8)]
    def fused(x, weight): return deco.dit.normed_rotated(norm, x[:, :, 0], rope)    # not contiguous
    def plain(x, weight): return deco.dit.rotate(norm(x[:, :, 0]), *rope)
    inputs = x, norm.weight
    assert torch.autograd.gradcheck(fused, inputs) and torch.allclose(fused(*inputs), plain(*inputs))
    got, want = (torch.autograd.grad(f(*inputs).sin().sum(), inputs) for f in (fused, plain))
    assert all(map(torch.allclose, got, want))


def pages_mapped(keep: bool) -> int:
    "How many pages are mapped for tensors when others of their size have come and gone."
    import resource
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**20) for _ in range(24)]                 # 96 MiB, of 24,576 pages
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if keep: assert deco.core.pick_device("cpu") == "cpu"
    faults()
    return faults()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept():
    "Tensors of a second step find the pages of the first. In new processes: glibc learns by itself, later."
    assert apart(pages_mapped, False) > 20_000 and apart(pages_mapped, True) < 2500


# --- draws

def test_draws_know_no_threads():
    cfg = Config()
    one, four = (noise_times_coins(cfg, 7, (16, 3, 8, 8), threads) for threads in (1, 4))
    assert all(map(torch.equal, one, four))


def test_the_thread_ahead_is_on_its_own_gpu(monkeypatch):
    "A new thread's device is the first GPU: page-locking there would open all processes' contexts on it."
    said = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.append((device, threading.get_ident())))
    where = []
    def items():
        for k in range(3):
            where.append(threading.get_ident())
            yield k
    assert list(training._ahead(items(), "cuda:5")) == [0, 1, 2]
    assert said == [("cuda:5", where[0])] and threading.get_ident() not in where
    assert list(training._ahead(items(), "cpu")) == [0, 1, 2] and len(said) == 1


def test_a_thread_that_fails_is_heard(monkeypatch):
    def broken(*key): raise MemoryError("no room")
    monkeypatch.setattr(training, "generator", broken)
    for threads in (1, 4):
        with pytest.raises(MemoryError, match="no room"):
            noise_times_coins(Config(), 0, (4, 3, 8, 8), threads)


def test_rounding_of_the_gpu_script():
    "TF32's ten bits: of 1 + 2^-11 nothing is left, of 1 + 2^-10 all."
    from gpu import Rounded
    a = torch.tensor([[1 + 2.0**-11 - 2.0**-20, 1 + 2.0**-10, -3.0, 1e-30]])
    with Rounded(10): got = (a.T @ torch.ones(1, 1)).flatten().tolist()
    assert got[:3] == [1.0, 1 + 2.0**-10, -3.0] and math.isclose(got[3], 1e-30, rel_tol=1e-3)
