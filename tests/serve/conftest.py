"""A tiny model with random weights, on disk."""

from pathlib import Path

import pytest

from yan_core.checkpoint import save_pretrained
from yan_core.config import BaselineConfig, ModelConfig, TokenizerConfig
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

STORY = "Mary went to the kitchen. John took the apple to the garden. Where is Mary?"


TINY = ModelConfig(d_model=32, num_heads=2, max_positions=64)


def save_tiny(folder: Path, max_source_tokens: int = 32, architecture: ModelConfig | BaselineConfig = TINY) -> Path:
    """Save a random model, by default with 64 positions, that answers in at most 4 tokens."""
    tokenizer = Tokenizer.train([STORY], TokenizerConfig(vocab_size=64))
    model = build_model(architecture, tokenizer.vocab_size, seed=1)
    details = {"task": "question_answering", "max_source_tokens": max_source_tokens, "max_target_tokens": 4}
    save_pretrained(folder, model, tokenizer, details)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as a run called `tiny` leaves it."""
    return save_tiny(tmp_path_factory.mktemp("runs") / "tiny" / "model")
