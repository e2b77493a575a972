"""How different several answers to one source are.

Figures of a row are averaged over the rows; words are what white space separates. A random choice of words is the most
diverse answer of all: read these beside a figure of quality.
"""

from __future__ import annotations

from collections.abc import Sequence

from yan_core.bootstrap import Scores
from yan_core.metrics import bleu


def distinct_n(candidates: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of some texts; 0 where there is none.

    Source: Li et al. 2016, arXiv:1510.03055.
    """
    grams = [
        tuple(words[i : i + n]) for words in (text.split() for text in candidates) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(candidates: Sequence[str]) -> float:
    """Mean BLEU of each text with all others as its references, in [0, 1]; equal texts have 1.

    Source: Zhu et al. 2018, arXiv:1802.01886 (Texygen).
    """
    if not any(text.strip() for text in candidates):
        return 1.0
    others = [[*candidates[:i], *candidates[i + 1 :]] for i in range(len(candidates))]
    scores = bleu(candidates, others).rows
    return sum(scores) / len(scores)


def diversity(candidates: Sequence[Sequence[str]]) -> dict[str, Scores]:
    """Self-BLEU (less is more diverse), distinct-1, distinct-2 and the share of different texts (more is).

    Args:
        candidates: Two or more texts of each row.

    Raises:
        ValueError: If there is no row, or a row has fewer than two.
    """
    if not candidates or min(map(len, candidates)) < 2:
        raise ValueError("diversity needs at least one row and two candidates of each")
    return {
        "self_bleu": Scores.of_means([self_bleu(texts) for texts in candidates]),
        "distinct_1": Scores.of_means([distinct_n(texts, 1) for texts in candidates]),
        "distinct_2": Scores.of_means([distinct_n(texts, 2) for texts in candidates]),
        "distinct_answers": Scores.of_means([len({*texts}) / len(texts) for texts in candidates]),
    }
