"What the notebooks share: how figures look, and what bad input is answered with."
import matplotlib.pyplot as plt

STYLE = {"figure.dpi": 90, "font.size": 9, "axes.titlesize": 10}


def style(**changed) -> None:
    "Set the look of the figures of a notebook; `changed` are other values of matplotlib's rcParams, dots written as __."
    plt.rcParams.update(STYLE | {name.replace("__", "."): value for name, value in changed.items()})


def complaint(f, *args, **kwargs) -> str:
    "Call f and say what it complains about, with the kind of the error. AssertionError where it does not complain."
    try: f(*args, **kwargs)
    except (ValueError, OSError, ImportError, FloatingPointError, SystemExit) as e: return f"{type(e).__name__}: {e}"
    raise AssertionError("no complaint")
