"The golden files: inputs and outputs of the authors' code, and how its samplers were set."
from pathlib import Path
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

RUNS = {"euler_nocfg": dict(steps=10),
        "euler_cfg": dict(steps=10, guidance=3.2, interval=(0.1, 1.0)),
        "euler_shift3": dict(steps=10, guidance=4.0, shift=3.0),
        "heun_exact": dict(steps=5, guidance=2.0, solver="heun"),
        "heun": dict(steps=5, guidance=2.0, solver="heun_fsal"),
        "adam2": dict(steps=10, guidance=4.0, shift=3.0, solver="adams", order=2),
        "adam3": dict(steps=10, guidance=2.0, solver="adams", order=3)}


def golden(name: str) -> dict[str, Tensor]: return load_file(GOLDEN / f"{name}.safetensors")


def state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    "The weights of a golden file, by the authors' names."
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
