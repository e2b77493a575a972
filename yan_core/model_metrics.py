"""Metrics that another language model gives, read from a local folder: BERTScore and generative perplexity.

Nothing is downloaded. Figures by different models are not comparable: name the model with the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yan_core.bootstrap import Scores

BATCH = 32
"""Texts that a model reads at a time."""


def check_folder(folder: str | Path) -> None:
    """Look for a model before it is read.

    Raises:
        ValueError: If there is none, or none in safetensors: what is pickled is not read.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"no model at {folder}: name a folder as transformers saves it, with config.json, weights, tokenizer"
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"{folder} holds no weights in safetensors: save the model anew with today's transformers")


def _load(folder: str | Path, kind: str, device: str) -> tuple[Any, Any, int]:
    """Tokenizer and model of a local folder in the format of `transformers`, and its longest text in tokens."""
    try:
        import transformers
    except ImportError as error:
        remedy = "in the folder of YAN's pyproject.toml: pip install -e '.[baselines]'"
        raise ImportError(f"BERTScore and perplexity need transformers; {remedy}", name=error.name) from error
    check_folder(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    kinds = getattr(transformers, kind)
    model = kinds.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    longest = min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )
    return tokenizer, model.to(device).eval(), longest


class BertScore:
    """BERTScore F1 of a local encoder: each token meets the most similar one of the other text.

    Embeddings are those of the last layer; special tokens do not take part; no weighting by rarity and no rescaling.
    Texts are cut at the model's longest length. The paper picks a layer for each model, so its figures differ.

    Source: Zhang et al. 2020, arXiv:1904.09675, sec. 3. Own code, since bert-score is no longer kept up.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Read the model.

        Args:
            folder: Model folder as `transformers` saves it.
            device: Where it runs.

        Raises:
            ValueError: If there is no model.
            ImportError: If `transformers` is not installed.
        """
        self.tokenizer, self.model, self.longest = _load(folder, "AutoModel", device)
        self.device = device

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Unit vectors of each text's tokens, [tokens, width]."""
        found: list[Tensor] = []
        for start in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                list(texts[start : start + BATCH]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_special_tokens_mask=True,
            )
            real = (batch.pop("special_tokens_mask") == 0) & (batch["attention_mask"] == 1)
            hidden = F.normalize(self.model(**batch.to(self.device)).last_hidden_state, dim=-1).cpu()
            found += [vectors[mask] for vectors, mask in zip(hidden, real, strict=True)]
        return found

    def __call__(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        """Scores of answers, each by its best reference; a text without tokens has 0."""
        flat = [text for rs in references for text in rs]
        ordered = sorted({*answers, *flat}, key=lambda text: (len(text), text))  # texts of like length in a batch
        vectors = dict(zip(ordered, self._embed(ordered), strict=True))
        pairs = zip(answers, references, strict=True)
        return Scores.of_means([max((_f1(vectors[a], vectors[r]) for r in rs), default=0.0) for a, rs in pairs])


def _f1(answer: Tensor, reference: Tensor) -> float:
    """Harmonic mean of the greedy matches of two texts' unit vectors, [tokens, width] each."""
    if not len(answer) or not len(reference):
        return 0.0
    similarity = answer @ reference.T
    precision, recall = similarity.max(1).values.mean().item(), similarity.max(0).values.mean().item()
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


class Perplexity:
    """Perplexity of answers under a local causal language model, each after the text that comes before it.

    The less the more fluent, but a text that says one word over and over has a low one too: read it beside diversity.
    Only the answers' tokens count, over all rows together; an answer of no token has no part in it, and where no answer
    has any there is no figure (NaN).
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Read the model.

        Args:
            folder: Model folder as `transformers` saves it.
            device: Where it runs.

        Raises:
            ValueError: If there is no model.
            ImportError: If `transformers` is not installed.
        """
        self.tokenizer, self.model, self.longest = _load(folder, "AutoModelForCausalLM", device)
        self.device = device

    @torch.no_grad()
    def __call__(self, contexts: Sequence[str], answers: Sequence[str]) -> Scores:
        """Scores whose value is exp of the mean negative log-likelihood of the answers' tokens.

        Args:
            contexts: What comes before each answer; may be empty. What is too long loses its beginning.
            answers: One a row.
        """
        start = self.tokenizer.bos_token_id
        statistics = []
        for context, answer in zip(contexts, answers, strict=True):
            before = self.tokenizer(context, add_special_tokens=False).input_ids
            own = self.tokenizer(f" {answer}" if before else answer, add_special_tokens=False).input_ids
            own = own[: self.longest - 1] if answer.strip() else []
            ids = [*([] if start is None else [start]), *before, *own][-self.longest :]
            scored = min(len(own), len(ids) - 1)  # nothing foretells the first token
            if scored <= 0:
                statistics.append([0.0, 0.0])
                continue
            given = torch.tensor([ids], device=self.device)
            log_probs = self.model(given).logits[0, :-1].float().log_softmax(-1)
            found = log_probs.gather(1, given[0, 1:, None])[-scored:]
            statistics.append([-float(found.double().sum()), float(scored)])
        return Scores(np.array(statistics, np.float64).reshape(-1, 2), _exp_ratio)


def _exp_ratio(sums: np.ndarray) -> np.ndarray:
    """exp of the first statistic over the second, [..., 2] -> [...]; NaN where there is no token."""
    return np.where(sums[..., 1] > 0, np.exp(sums[..., 0] / np.maximum(1, sums[..., 1])), np.nan)
