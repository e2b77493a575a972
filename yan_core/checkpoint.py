"""A model on disk: weights, config, tokenizer, format version and commit, saved and loaded together.

A folder holds `model.safetensors`, `config.json` and `tokenizer.json`. `config.json` carries the SHA-256 of the other
two; it is checked on loading. `README.md` (the model card) and `tokenizer_config.json` are for people and for other
libraries, and never read here. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from yan_core.card import model_card
from yan_core.config import BaselineConfig, ModelConfig, from_dict, to_dict
from yan_core.files import atomic_folder, code_commit, sha256_file
from yan_core.model import YanModel, build_model
from yan_core.tokenization import Tokenizer

if TYPE_CHECKING:
    from yan_core.baselines import Baseline
    from yan_core.generator import TextGenerator

FORMAT_VERSION = 2
"""Raised when a folder written by this code cannot be read by older code."""


DETAILS = ("task", "max_source_tokens", "max_target_tokens")
"""What generation needs beside model and tokenizer."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another format."""


def save_pretrained(
    folder: str | Path,
    model: YanModel | Baseline,
    tokenizer: Tokenizer,
    details: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder, atomically.

    Args:
        folder: Where to; a folder there is replaced when the new one is complete.
        model: The weights are written as they are, bit for bit.
        tokenizer: Written beside them.
        details: What else generation needs, `DETAILS`; any record besides.
        weights: Written instead of the model's own: a copy of an earlier moment, or averages; a tensor for each of its
            names, of the same [shape].
    """
    from yan_core import __version__

    with atomic_folder(Path(folder)) as scratch:
        tensors = {name: value.detach().cpu().contiguous() for name, value in (weights or model.state_dict()).items()}
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        config = {
            "format_version": FORMAT_VERSION,
            "yan_version": __version__,
            "commit": code_commit(),
            "vocab_size": model.vocab_size,
            "baseline" if isinstance(model.config, BaselineConfig) else "model": to_dict(model.config),
            "details": details,
            "sha256": {name: sha256_file(scratch / name) for name in ("model.safetensors", "tokenizer.json")},
        }
        (scratch / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (scratch / "tokenizer_config.json").write_text(tokenizer.transformers_json(), encoding="utf-8")
        num_parameters = sum(tensor.numel() for tensor in tensors.values())
        card = model_card(details.get("run", Path(folder).name), config, tokenizer, num_parameters)
        (scratch / "README.md").write_text(card, encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The verified `config.json` of a model folder.

    Raises:
        CheckpointError: If the folder is missing, damaged or of another format; says which file.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a YAN model: it has no config.json. Name the folder that `yan run` leaves in "
            "runs/<name>/model."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); train again or restore it from a copy") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, this code reads {FORMAT_VERSION}; "
            "use the version of YAN that wrote it"
        )
    missing = {"vocab_size", "details", "sha256"} - set(config)
    if not {"model", "baseline"} & set(config):
        missing.add("model")
    if "details" not in missing:
        missing |= {f"details.{name}" for name in DETAILS if name not in config["details"]}
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}; restore it from a copy")
    for name in ("model.safetensors", "tokenizer.json"):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the model was copied in part: copy the whole folder again")
        if sha256_file(file) != config["sha256"].get(name):
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is not the one in config.json (cut short while copying?); "
                "copy the whole folder again or train again"
            )
    return config


def from_pretrained(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[YanModel | Baseline, Tokenizer, dict[str, Any]]:
    """Read a model folder, of YAN or of a baseline.

    Args:
        folder: Written by `save_pretrained`.
        device: Where the weights go.

    Returns:
        The model in evaluation mode, its tokenizer and the details it was saved with.

    Raises:
        CheckpointError: If anything in it is missing, damaged or does not fit.
    """
    config = read_config(folder)
    try:
        if "baseline" in config:
            architecture = from_dict(BaselineConfig, config["baseline"], "baseline")
        else:
            architecture = from_dict(ModelConfig, config["model"], "model")
    except ValueError as error:
        raise CheckpointError(f"{Path(folder) / 'config.json'} describes no model of this code: {error}") from error
    model = build_model(architecture, config["vocab_size"], seed=0)
    weights = Path(folder) / "model.safetensors"
    try:
        model.load_state_dict(load_file(weights, device=str(device)), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{weights} does not fit its config.json: {error}") from error
    tokenizer = Tokenizer.from_json((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    return model.to(device).eval(), tokenizer, config["details"]


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    use_graphs: bool = False,
) -> TextGenerator:
    """Read a model folder for generation: `yan_core.load("runs/world/model").generate(["..."])`.

    Args:
        folder: Written by `save_pretrained`.
        device: Where it runs.
        dtype: Of weights and latents; torch.bfloat16 halves the memory and is several times as fast where the hardware
            has it.
        use_graphs: Meet few shapes only, and replay CUDA graphs on a GPU; see `TextGenerator`.

    Raises:
        CheckpointError: If the folder is missing, damaged or of another format.
    """
    from yan_core.generator import TextGenerator

    model, tokenizer, details = from_pretrained(folder, device)
    return TextGenerator(model.to(dtype), tokenizer, details, use_graphs)
