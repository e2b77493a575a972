"""Text in, text out: the sampler with its tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yan_core.baselines import Baseline, beyond_baselines
from yan_core.batching import SOURCE_BUCKET, length_bucket, pad_rows
from yan_core.config import NUM_STEPS, SamplingConfig
from yan_core.graphs import GraphCache
from yan_core.model import YanModel
from yan_core.sampler import OnStep, sample
from yan_core.solver import trunk_passes
from yan_core.tasks import get_task
from yan_core.tokenization import Encoding, Tokenizer


@dataclass(frozen=True)
class Candidate:
    """One text drawn for a source, in token ids.

    Attributes:
        tokens: Token ids before the first end-of-text token.
        experts: Expert of each of them; a baseline has none.
        finished: Whether the text ended by itself rather than at the limit.
        number: Which of those drawn it is, from 0 on; number 0 is the one drawn alone.
        score: What it was ranked by, the higher the better; 0 where there is no other.
        log_probs: The decoder's log-probability of each token, where asked for.
    """

    tokens: list[int]
    experts: list[int]
    finished: bool
    number: int = 0
    score: float = 0.0
    log_probs: list[float] | None = None


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one source.

    Attributes:
        candidates: All that were drawn, the best first.
        nfe: Trunk passes of each.
    """

    candidates: list[Candidate]
    nfe: int


OnDrawStep = Callable[[list[int], int, Callable[[], list[list[Candidate]]]], None]
"""Called after each solver step with the indices of the sources that took it, the number of steps done, and a function
that reads the candidates of each of these sources where they are by then, in the order they were drawn."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer.
        tokens: Its token ids, before the first end-of-text token.
        source_tokens: Tokens of the source that were read.
        source_tokens_cut: Tokens of the source that were cut off to fit.
        num_steps: Solver steps.
        nfe: Trunk passes of each candidate.
        finished: Whether the text ended by itself rather than at the limit.
        latency_ms: Time of the whole batch from text to text, in milliseconds.
    """

    text: str
    tokens: list[int]
    source_tokens: int
    source_tokens_cut: int
    num_steps: int
    nfe: int
    finished: bool
    latency_ms: float


@dataclass(frozen=True)
class _How:
    """All that the computation of a batch depends on besides its tensors, and so the key of its CUDA graph.

    Attributes:
        places: Tokens of each answer.
        num_steps: Solver steps.
        sampling: Solver, guidance and candidates.
        with_log_probs: Whether the candidates' log-probabilities are wanted.
    """

    places: int
    num_steps: int
    sampling: SamplingConfig
    with_log_probs: bool


class TextGenerator:
    """A loaded model that answers texts."""

    def __init__(
        self, model: YanModel | Baseline, tokenizer: Tokenizer, details: dict[str, Any], use_graphs: bool = False
    ) -> None:
        """Join model, tokenizer and the details they were saved with.

        Args:
            model: In evaluation mode.
            tokenizer: Its tokenizer.
            details: Task and lengths, as `save_pretrained` got them.
            use_graphs: Pad batches to a power of two and sources to a multiple of 16 tokens, and on a GPU replay a CUDA
                graph for each such shape and kind of request.
        """
        self.graphs = GraphCache() if use_graphs else None
        self.model, self.tokenizer, self.details = model, tokenizer, details
        self.task = get_task(details["task"])
        self.max_source_tokens = int(details["max_source_tokens"])
        self.max_target_tokens = int(details["max_target_tokens"])
        self.device = next(model.parameters()).device

    @property
    def most_tokens(self) -> int:
        """Longest answer that may be asked for."""
        positions = self.model.config.max_positions
        return positions - self.max_source_tokens - 1 if isinstance(self.model, Baseline) else positions

    def generate(
        self,
        sources: Sequence[str],
        num_steps: int = NUM_STEPS,
        max_tokens: int | None = None,
        seeds: Sequence[int] | int = 0,
        *,
        sampling: SamplingConfig = SamplingConfig(),
        lengths: Sequence[int] | None = None,
        deterministic: bool = False,
        do_sample: bool = False,
    ) -> list[Generation]:
        """Answer a batch of sources at once; one without a word too, from nothing.

        Args:
            sources: Texts as the model's task template makes them.
            num_steps: Solver steps, >= 1.
            max_tokens: Longest answer, in tokens, up to the model's max_positions; None: what it was trained for.
            seeds: One seed, or one a source, each in [0, 2**63). The same source and seed give the same answer in any
                batch, but for ties of logits closer than rounding, which differs with a batch's shape.
            sampling: Solver, guidance, and candidates, of which the best is given.
            lengths: Each answer's number of tokens, where it is known.
            deterministic: Draw the noise on the CPU and compute every source by itself, in a shape that its own length
                decides, so that rounding too is the same in any company. Slower, as nothing is shared.
            do_sample: Have a baseline draw each token by the seed in place of the likeliest (`Baseline.answer`); YAN
                draws in any case.

        Raises:
            ValueError: If an argument is out of range.
        """
        if isinstance(sources, str) or not all(isinstance(source, str) for source in sources):
            raise ValueError(f"sources must be a list of texts, got {sources!r:.80}")
        started = time.perf_counter()
        encodings = self.encode(sources)
        drawn = self.draw(
            encodings,
            num_steps,
            max_tokens,
            seeds,
            sampling=sampling,
            lengths=lengths,
            deterministic=deterministic,
            do_sample=do_sample,
        )
        best = [answer.candidates[0] for answer in drawn]
        texts = [self.tokenizer.decode(candidate.tokens) for candidate in best]
        latency_ms = (time.perf_counter() - started) * 1000
        return [
            Generation(
                text=text,
                tokens=candidate.tokens,
                source_tokens=len(encoding.ids),
                source_tokens_cut=encoding.num_cut,
                num_steps=num_steps,
                nfe=answer.nfe,
                finished=candidate.finished,
                latency_ms=latency_ms,
            )
            for text, candidate, answer, encoding in zip(texts, best, drawn, encodings, strict=True)
        ]

    def encode(self, sources: Sequence[str]) -> list[Encoding]:
        """Token ids of sources, cut to what the model reads, at the end that its task can miss."""
        return self.tokenizer.encode_batch(sources, self.max_source_tokens, self.task.keep)

    def draw(
        self,
        encodings: Sequence[Encoding],
        num_steps: int = NUM_STEPS,
        max_tokens: int | None = None,
        seeds: Sequence[int] | int = 0,
        *,
        sampling: SamplingConfig = SamplingConfig(),
        lengths: Sequence[int] | None = None,
        deterministic: bool = False,
        do_sample: bool = False,
        with_log_probs: bool = False,
        on_step: OnDrawStep | None = None,
    ) -> list[Drawn]:
        """The middle of `generate`: from token ids to token ids, all candidates of each source.

        Args:
            encodings: From `encode`.
            num_steps: As all arguments that are not named here: see `generate`.
            with_log_probs: Whether the candidates' log-probabilities are wanted.
            on_step: See `OnDrawStep`; what it raises ends the drawing. CUDA graphs, which have no steps, are not used.

        Raises:
            ValueError: If an argument is out of range, or is for YAN alone and the model is a baseline.
        """
        if not encodings:
            return []
        count = len(encodings)
        seeds = [seeds] * count if isinstance(seeds, int) else list(seeds)
        if len(seeds) != count:
            raise ValueError(f"seeds must be one number or one a source: got {len(seeds)} for {count} sources")
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"seeds must be in [0, 2**63), got {min(seeds)} to {max(seeds)}")
        if lengths is not None and len(lengths) != count:
            raise ValueError(f"lengths must be one a source: got {len(lengths)} for {count} sources")
        places = self.max_target_tokens if max_tokens is None else max_tokens
        if not 1 <= places <= self.most_tokens:
            raise ValueError(f"max_tokens must be in [1, {self.most_tokens}], got {places}")
        how = _How(places, num_steps, sampling, with_log_probs)
        if isinstance(self.model, Baseline):
            self._check_of_baseline(how, on_step)
        greedy = isinstance(self.model, Baseline) and not do_sample
        eager = deterministic or lengths is not None or on_step is not None or isinstance(self.model, Baseline)
        graphs = None if eager else self.graphs
        drawn: list[Drawn] = []
        for chosen in [[i] for i in range(count)] if deterministic else [list(range(count))]:
            longest = max(len(encodings[i].ids) for i in chosen)
            padded, device = max(1, longest), self.device
            if deterministic:
                device = torch.device("cpu")  # of the draws
            if deterministic or graphs is not None:
                most = longest if deterministic else max(longest, self.max_source_tokens)
                padded = -(-max(1, most) // SOURCE_BUCKET) * SOURCE_BUCKET
                padded = padded if deterministic else min(length_bucket(longest), padded)
                padded = min(padded, self.model.config.max_positions)
            ids, mask = pad_rows([encodings[i].ids for i in chosen], Tokenizer.pad_id, padded)
            keys = torch.tensor([seeds[i] for i in chosen])
            if graphs is None:
                told = None if lengths is None else torch.tensor([lengths[i] for i in chosen])
                inputs = ids.to(self.device), mask.to(self.device)
                drawn_by = None if greedy else keys.to(device)
                found, passes = self._write(how, *inputs, drawn_by, told, self._reader(chosen, places, on_step))
            else:
                found = self._replay(graphs, how, ids, mask, keys)[:, : len(chosen)]
                passes = trunk_passes(num_steps, sampling)
            drawn += [
                Drawn(sorted(candidates, key=lambda candidate: -candidate.score), passes)
                for candidates in self._candidates(found, places, with_log_probs)
            ]
        return drawn

    def _check_of_baseline(self, how: _How, on_step: OnDrawStep | None) -> None:
        beyond = beyond_baselines(how.sampling)
        beyond += ["with_log_probs"] * how.with_log_probs + ["on_step"] * (on_step is not None)
        if beyond:
            raise ValueError(f"{', '.join(beyond)} are for YAN alone and this is a baseline, got {how.sampling}")
        if how.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {how.num_steps}")

    def _reader(self, chosen: list[int], places: int, on_step: OnDrawStep | None) -> OnStep | None:
        """The sampler's callback for some of the sources."""
        if on_step is None:
            return None
        call = on_step

        def step_done(step: int, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
            call(chosen, step, lambda: self._candidates(_packed(*read()), places, False))

        return step_done

    def _write(
        self,
        how: _How,
        ids: Tensor,
        mask: Tensor,
        seeds: Tensor | None,
        lengths: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, int]:
        """A batch's answers as `_packed` gives them, and the passes of each; without seeds a baseline is greedy."""
        if isinstance(self.model, Baseline):
            told = None if lengths is None else lengths.to(ids.device)
            keys = None if seeds is None else seeds.to(ids.device)
            answers, passes = self.model.answer(ids, mask, how.places, how.num_steps, told, keys)
            return _packed(answers[:, None]), passes
        assert seeds is not None
        found = sample(
            self.model,
            ids,
            mask,
            how.places,
            seeds,
            how.num_steps,
            sampling=how.sampling,
            lengths=lengths,
            with_log_probs=how.with_log_probs,
            on_step=on_step,
        )
        return _packed(found.candidates, found.experts, found.log_probs, found.scores), found.nfe

    def _replay(self, graphs: GraphCache, how: _How, ids: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
        """Answers of a batch filled up to a power of two with empty rows, as `_packed` gives them."""
        extra = 2 ** (len(seeds) - 1).bit_length() - len(seeds)
        filled = F.pad(ids, (0, 0, 0, extra)), F.pad(mask, (0, 0, 0, extra)), F.pad(seeds, (0, extra))

        def draw(ids: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
            return self._write(how, ids, mask, seeds)[0]

        return graphs.call(how, draw, *(value.to(self.device) for value in filled))

    def _candidates(self, found: Tensor, places: int, with_log_probs: bool) -> list[list[Candidate]]:
        """The candidates of each source from `_packed`, in the order they were drawn."""
        ids, experts, log_probs, scores = found.cpu()
        knows_length = getattr(self.model, "length_head", None) is not None
        has_experts = not isinstance(self.model, Baseline)
        sources: list[list[Candidate]] = []
        for rows in zip(ids.long().tolist(), experts.long().tolist(), log_probs.tolist(), scores.tolist(), strict=True):
            candidates = []
            for number, (row, expert, log_prob, score) in enumerate(zip(*rows, strict=True)):
                tokens = self.tokenizer.until_eos(row)
                candidates.append(
                    Candidate(
                        tokens=tokens,
                        experts=expert[: len(tokens)] if has_experts else [],
                        finished=len(tokens) < places or knows_length,
                        number=number,
                        score=score[0],
                        log_probs=log_prob[: len(tokens)] if with_log_probs else None,
                    )
                )
            sources.append(candidates)
        return sources


def _packed(
    ids: Tensor, experts: Tensor | None = None, log_probs: Tensor | None = None, scores: Tensor | None = None
) -> Tensor:
    """All there is to know of answers in one tensor, so that a GPU is asked once and a CUDA graph has one output.

    Args:
        ids: Token ids, [batch, num_candidates, length].
        experts: Expert of each token, same shape.
        log_probs: Log-probability of each token, same shape.
        scores: Of each candidate, [batch, num_candidates].

    Returns:
        Token ids, experts, log-probabilities and scores as float64, which holds each of them exactly,
        [4, batch, num_candidates, length]; zeros for what is None.
    """
    scores = None if scores is None else scores[..., None].expand_as(ids)
    nothing = torch.zeros_like(ids, dtype=torch.float64)
    return torch.stack(
        [nothing if part is None else part.to(torch.float64) for part in (ids, experts, log_probs, scores)]
    )
