"""YAN's model: text -> tokens -> latents -> flow -> latents -> text, in plain PyTorch (arXiv:2604.15009)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "Generation": "generator",
    "ModelConfig": "config",
    "RunConfig": "config",
    "TextGenerator": "generator",
    "Tokenizer": "tokenization",
    "YanModel": "model",
    "from_dict": "config",
    "load": "checkpoint",
    "to_dict": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: processes that only tokenise start two seconds sooner so."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
