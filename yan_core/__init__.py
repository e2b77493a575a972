"""YAN's model: text -> tokens -> latents -> flow -> latents -> text, in plain PyTorch (arXiv:2604.15009)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yan_core.checkpoint import load, save_pretrained
    from yan_core.config import ModelConfig, RunConfig, from_dict, to_dict
    from yan_core.generator import Generation, TextGenerator
    from yan_core.model import YanModel, build_model
    from yan_core.sampler import Sample, sample
    from yan_core.tokenization import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Generation",
    "ModelConfig",
    "RunConfig",
    "Sample",
    "TextGenerator",
    "Tokenizer",
    "YanModel",
    "build_model",
    "from_dict",
    "load",
    "sample",
    "save_pretrained",
    "to_dict",
]

_HOME = {
    "Generation": "generator",
    "ModelConfig": "config",
    "RunConfig": "config",
    "Sample": "sampler",
    "TextGenerator": "generator",
    "Tokenizer": "tokenization",
    "YanModel": "model",
    "build_model": "model",
    "from_dict": "config",
    "load": "checkpoint",
    "sample": "sampler",
    "save_pretrained": "checkpoint",
    "to_dict": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: processes that only tokenise start two seconds sooner so."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
