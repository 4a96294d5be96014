"What the notebooks share: how figures look, and what bad input is answered with."
import matplotlib.pyplot as plt

STYLE = {"figure.dpi": 90, "font.size": 9, "axes.titlesize": 10}


def style(**changed) -> None:
    "Set the look of a notebook's figures; `changed`: other values of matplotlib's rcParams, __ for a dot."
    plt.rcParams.update(STYLE | {name.replace("__", "."): value for name, value in changed.items()})


def complaint(f, *args, **kwargs) -> str:
    "Call f and give the kind and text of the error that it raises. AssertionError where it raises none."
    expected = (ValueError, OSError, ImportError, FloatingPointError, SystemExit)
    try: f(*args, **kwargs)
    except expected as e: return f"{type(e).__name__}: {e}"
    raise AssertionError("no complaint")
