__version__ = "0.1.0"

import os
import signal
import sys

PARENT = os.getppid()                           # torchrun, perhaps; torch takes its time to be imported
_STOPS = "SIGINT SIGTERM SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGXCPU SIGBREAK"      # of terminals and schedulers
STOP_SIGNALS = [getattr(signal, name) for name in _STOPS.split() if hasattr(signal, name)]

def _end_early(number, frame):
    "End at once, in one line: while a command is imported there is nothing to save."
    os.write(2, b"stopped\n")
    os._exit(128 + number)

if sys.argv[:1] == ["-m"] and any(word.startswith(("deco.", "-mdeco.")) for word in sys.orig_argv):
    for _s in STOP_SIGNALS:                     # until `core.run_command` takes over
        if signal.getsignal(_s) not in (signal.SIG_IGN, None): signal.signal(_s, _end_early)

from .data import make_grid, openmoji
from .datasets import load_data
from .dct import frequency_loss, jpeg_weights
from .decoder import PixelDecoder
from .dit import DiT
from .model import DeCo, create, load, sample_images, save
from .official import load_official
from .text import TextEncoder, sample_prompts

__all__ = ["DeCo", "DiT", "PixelDecoder", "TextEncoder", "create", "frequency_loss", "jpeg_weights", "load",
           "load_data", "load_official", "make_grid", "openmoji", "sample_images", "sample_prompts", "save"]
