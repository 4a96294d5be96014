__version__ = "0.1.0"

from .data import make_grid, openmoji
from .datasets import load_data
from .dct import frequency_loss, jpeg_weights
from .decoder import PixelDecoder
from .dit import DiT
from .model import DeCo, create, load, sample_images, save
from .official import load_official
from .text import TextEncoder, sample_prompts

__all__ = ["DeCo", "DiT", "PixelDecoder", "TextEncoder", "create", "frequency_loss", "jpeg_weights", "load", "load_data", "load_official",
           "make_grid", "openmoji", "sample_images", "sample_prompts", "save"]
