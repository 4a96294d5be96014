"What the notebooks share: how figures look, what bad input is answered with, a process of its own."
import multiprocessing
import os
import socket
from collections.abc import Callable
import matplotlib.pyplot as plt
import torch
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

STYLE = {"figure.dpi": 90, "font.size": 9, "axes.titlesize": 10}


def style(**changed) -> None:
    "Set the look of a notebook's figures; `changed`: other values of matplotlib's rcParams, __ for a dot."
    plt.rcParams.update(STYLE | {name.replace("__", "."): value for name, value in changed.items()})


def chart(boxes: dict[str, tuple], arrows: list[tuple], title: str) -> None:
    "Draw boxes {name: (x, y, text)}, with x and y from 0 to 1, and arrows (from, to, what passes)."
    fig, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    ax.set(xlim=(-0.02, 1.02), ylim=(0, 1.2), title=title)
    ax.axis("off")
    drawn = {name: ax.text(x, y, text, ha="center", va="center", fontsize=9,
                           bbox=dict(boxstyle="round,pad=0.6", facecolor="0.95", edgecolor="0.4"))
             for name, (x, y, text) in boxes.items()}
    for start, end, text in arrows:
        (x0, y0, _), (x1, y1, _) = boxes[start], boxes[end]
        ax.annotate("", (x1, y1), (x0, y0), zorder=0,
                    arrowprops=dict(arrowstyle="-|>", patchA=drawn[start].get_bbox_patch(),
                                    patchB=drawn[end].get_bbox_patch(), color="0.4"))
        ax.text((x0 + x1) / 2, (y0 + y1) / 2, text, ha="center", va="center", fontsize=7, color="C0",
                bbox=dict(facecolor="white", edgecolor="none", pad=1))
    plt.show()


def verdict(right: bool) -> None:
    "Say whether the answer to an exercise is right."
    print("right" if right else "not yet")


def complaint(f, *args, **kwargs) -> str:
    "Call f and give the kind and text of the error that it raises. AssertionError where it raises none."
    expected = (ValueError, OSError, ImportError, FloatingPointError, SystemExit)
    try: f(*args, **kwargs)
    except expected as e: return f"{type(e).__name__}: {e}"
    raise AssertionError("no complaint")


def kept_memory(f: Callable) -> int:
    "Count the bytes that autograd keeps for the backward pass of f(): they are freed with its result."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        result = f()                                               # noqa: F841 (kept alive)
    return sum(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]")


def forked(f: Callable):
    """Call f() in a process forked off this one, and give what it returns.

    Where the system does not fork (Windows), it is called here. EOFError: f() raised an error, printed above.
    """
    if "fork" not in multiprocessing.get_all_start_methods(): return f()
    context = multiprocessing.get_context("fork")
    answer, pipe = context.Pipe()
    def child():
        torch.set_num_threads(1)        # as the DataLoader does: OpenMP's threads do not survive a fork
        pipe.send(f())
    process = context.Process(target=child)
    process.start()
    pipe.close()                                # the child has its own end of it
    try: return answer.recv()
    finally: process.join()


def as_rank(index: int, port: int, f: Callable, args: tuple) -> None:
    "Be one of two processes, with the environment and the one thread that torchrun gives it."
    os.environ |= dict(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    f(*args)


def in_two_processes(f: Callable, *args) -> None:
    """Call f(*args) in two processes, as torchrun does; they are forked off this one, where the system forks.

    So torch is imported already. What torchrun itself adds is tried in 47_core and tests/test_parallel.py.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    mp.start_processes(as_rank, (port, f, args), nprocs=2, start_method=start)


def direction(ratios: list[float]) -> str:
    """Say whether ratios, one of each seed, are "lower" than 1, "higher", or "can't be told".

    All seeds have to agree, and their mean to lie 3 % from 1; that of one seed alone, a fifth.
    """
    mean = sum(ratios) / len(ratios)
    near = 0.2 if len(ratios) == 1 else 0.03
    if abs(mean - 1) < near or len({ratio < 1 for ratio in ratios}) > 1: return "can't be told"
    return "lower" if mean < 1 else "higher"
