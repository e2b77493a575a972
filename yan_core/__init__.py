"""YAN's model: text -> tokens -> latents -> flow -> latents -> text, in plain PyTorch (arXiv:2604.15009)."""

from yan_core.checkpoint import load
from yan_core.config import ModelConfig, RunConfig, from_dict, to_dict
from yan_core.generator import Generation, TextGenerator
from yan_core.model import YanModel
from yan_core.tokenization import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Generation",
    "ModelConfig",
    "RunConfig",
    "TextGenerator",
    "Tokenizer",
    "YanModel",
    "from_dict",
    "load",
    "to_dict",
]
