"""Text in, text out: seeds, lengths, what was cut, and company that changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.yan_core.tiny import randomize, tiny_config
from yan_core.config import SamplingConfig, TokenizerConfig
from yan_core.generator import TextGenerator
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

TEXT = "Mary went to the kitchen. John took the red apple there. Where is the apple now?"
TOKENIZER = Tokenizer.train([TEXT], TokenizerConfig(kind="word"))
SOURCES = ["Where is Mary?", "Mary went to the kitchen. Where is Mary?", "apple", "John took the apple there."]


def generator_of(task: str = "question_answering", mixer: Any = "attention", **details: Any) -> TextGenerator:
    model = randomize(build_model(tiny_config(mixer=mixer), TOKENIZER.vocab_size, 0)).eval()
    return TextGenerator(model, TOKENIZER, {"task": task, "max_source_tokens": 6, "max_target_tokens": 5, **details})


GENERATOR = generator_of()


def answers(sources: list[str], **settings: Any) -> list[list[int]]:
    return [generation.tokens for generation in GENERATOR.generate(sources, **settings)]


def test_an_answer_does_not_depend_on_its_company() -> None:
    together = answers(SOURCES, seeds=[3, 1, 4, 1])
    for source, seed, tokens in zip(SOURCES, (3, 1, 4, 1), together, strict=True):
        assert answers([source], seeds=seed) == [tokens]
    assert answers(SOURCES[::-1], seeds=[1, 4, 1, 3]) == together[::-1]


def test_the_seed_decides() -> None:
    assert answers(SOURCES, seeds=7) == answers(SOURCES, seeds=[7] * 4)
    assert answers(SOURCES, seeds=7) == answers(SOURCES, seeds=7)
    assert len({tuple(tokens) for tokens in answers(SOURCES[:1] * 12, seeds=list(range(12)))}) > 6
    assert answers(SOURCES[:1], seeds=2**63 - 1) != answers(SOURCES[:1], seeds=2**31 - 1)


@pytest.mark.parametrize(("task", "kept"), [("question_answering", "end"), ("classification", "start")])
def test_a_source_that_is_too_long_is_cut_at_the_tasks_side_and_counted(task: str, kept: str) -> None:
    generator = generator_of(task)
    ids = TOKENIZER.encode_batch([TEXT])[0].ids
    whole, short = generator.generate([TEXT, "Where is Mary?"], seeds=5)
    assert (whole.source_tokens, whole.source_tokens_cut) == (6, len(ids) - 6)
    assert (short.source_tokens, short.source_tokens_cut) == (4, 0)
    first, last = TOKENIZER.decode(ids[:6]), TOKENIZER.decode(ids[-6:])
    assert [e.ids for e in TOKENIZER.encode_batch([first, last])] == [ids[:6], ids[-6:]]
    of_whole, of_first, of_last = (
        [generation.tokens for generation in generator.generate([text] * 16, seeds=list(range(16)))]
        for text in (TEXT, first, last)
    )
    assert of_first != of_last
    assert of_whole == (of_last if kept == "end" else of_first)


def test_text_and_tokens_agree_and_end_at_the_end_of_text() -> None:
    for generation in GENERATOR.generate(SOURCES * 8, seeds=list(range(32))):
        assert Tokenizer.eos_id not in generation.tokens
        assert generation.text == TOKENIZER.decode(generation.tokens)
        assert generation.finished == (len(generation.tokens) < 5)
        assert generation.latency_ms > 0


def always(token: int) -> TextGenerator:
    generator = generator_of()
    with torch.no_grad():
        generator.model.decoder.head.bias[token] += 1e4
    return generator


def test_finished_says_whether_the_text_ended_by_itself() -> None:
    ended = always(Tokenizer.eos_id).generate(["Mary"])[0]
    assert (ended.tokens, ended.text, ended.finished) == ([], "", True)
    endless = always(7).generate(["Mary"], max_tokens=3)[0]
    assert (endless.tokens, endless.finished) == ([7, 7, 7], False)


@pytest.mark.parametrize("max_tokens", [None, 1, 3, 40])
def test_answers_are_no_longer_than_asked_for(max_tokens: int | None) -> None:
    assert len(always(7).generate(["Mary"], max_tokens=max_tokens)[0].tokens) == (max_tokens or 5)


@pytest.mark.parametrize("max_tokens", [0, -1, 41])
def test_a_length_out_of_range_is_refused(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"max_tokens must be in \[1, 40\], got {max_tokens}"):
        GENERATOR.generate(["Mary"], max_tokens=max_tokens)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_steps_are_passes(num_steps: int) -> None:
    generation = GENERATOR.generate(["Mary"], num_steps=num_steps)[0]
    assert generation.num_steps == generation.nfe == num_steps


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 for 1 sources"):
        GENERATOR.generate(["Mary"], seeds=[1, 2])
    with pytest.raises(ValueError, match="sources must be a list of texts, got 'Mary'"):
        GENERATOR.generate("Mary")
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        GENERATOR.generate(["Mary"], num_steps=0)
    for seed in (2**63, -1):
        with pytest.raises(ValueError, match=r"seeds must be in \[0, 2\*\*63\)"):
            GENERATOR.generate(["Mary"], seeds=seed)
    with pytest.raises(ValueError, match=r"data\.task: unknown name 'nothing'"):
        generator_of("nothing")


def test_no_source_and_an_empty_source_and_unknown_words() -> None:
    assert GENERATOR.generate([]) == []
    empty, unknown, alone = GENERATOR.generate(["", "xyzzy plugh", "Mary"], seeds=1)
    assert empty.source_tokens == 0 and unknown.source_tokens == 2
    assert [empty.tokens] == answers([""], seeds=1) and [alone.tokens] == answers(["Mary"], seeds=1)


def request(i: int) -> tuple[str, int]:
    """The i-th of many different requests: 1 to 6 words, a seed of its own."""
    words = TEXT.replace("?", "").replace(".", "").split()
    return " ".join(words[(i * k) % len(words)] for k in range(1, 2 + i % 6)), i * 7919


@pytest.mark.property
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_thousand_requests_give_the_same_tokens_alone_and_in_batches_of_64(deterministic: bool) -> None:
    requests = [request(i) for i in range(1000)]
    alone = [answers([source], seeds=seed, deterministic=deterministic)[0] for source, seed in requests]
    differ = 0
    for start in range(0, 1000, 64):
        sources, seeds = zip(*requests[start : start + 64], strict=True)
        together = answers(list(sources), seeds=list(seeds), deterministic=deterministic)
        differ += sum(a != b for a, b in zip(alone[start : start + 64], together, strict=True))
    assert len({tuple(tokens) for tokens in alone}) > 300  # or equality would say little
    assert differ <= (0 if deterministic else 1)


@pytest.mark.property
@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_company_moves_logits_by_rounding_alone(mixer: str) -> None:
    """So that a token can differ only where its two highest logits are closer than that."""
    generator = generator_of(mixer=mixer)
    model = generator.model
    passed: list[torch.Tensor] = []
    read = model.decoder.read

    def spy(latents: torch.Tensor, **options: Any) -> Any:
        passed.append(latents)
        return read(latents, **options)

    model.decoder.read = spy  # type: ignore[method-assign]
    requests = [request(i) for i in range(128)]
    for source, seed in requests:
        generator.generate([source], seeds=seed)
    alone = torch.cat(passed)
    passed.clear()
    for start in range(0, 128, 64):
        sources, seeds = zip(*requests[start : start + 64], strict=True)
        generator.generate(list(sources), seeds=list(seeds))
    with torch.no_grad():
        logits, together = model.decoder(alone), model.decoder(torch.cat(passed))
    moved = float((together - logits).abs().max())
    assert 0 < moved < 1e-5 * float(logits.abs().max())
    for row, other in zip(logits.flatten(0, 1), together.flatten(0, 1), strict=True):
        first, second = row.topk(2).values.tolist()
        assert row.argmax() == other.argmax() or first - second < 2 * moved


def test_deterministic_mode_takes_an_empty_source_and_one_as_long_as_the_model_allows() -> None:
    generator = generator_of(max_source_tokens=39)  # its bucket would be 48, the model holds 40
    long = " ".join(["Mary"] * 50)
    for source in ("", long):
        deterministic = generator.generate([source], deterministic=True)[0]
        assert deterministic.tokens == generator.generate([source])[0].tokens


def test_candidates_guidance_and_solver_reach_the_sampler() -> None:
    plain = GENERATOR.generate(SOURCES, seeds=3)
    guided = GENERATOR.generate(SOURCES, seeds=3, sampling=SamplingConfig(guidance_scale=3.0))
    assert [g.nfe for g in plain] == [3] * 4 and [g.nfe for g in guided] == [6] * 4
    assert GENERATOR.generate(SOURCES, seeds=3, sampling=SamplingConfig(method="midpoint"))[0].nfe == 6
    assert [g.tokens for g in guided] != [g.tokens for g in plain]
    sampling = SamplingConfig(num_candidates=8, ranking="confidence")
    best = GENERATOR.generate(SOURCES * 8, seeds=list(range(32)), sampling=sampling)
    assert [g.tokens for g in best] != answers(SOURCES * 8, seeds=list(range(32)))


@pytest.mark.parametrize("count", [1, 3, 4, 5])
@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(), SamplingConfig(num_candidates=3, ranking="confidence", guidance_scale=2.0)],
    ids=["usual", "guided candidates"],
)
def test_few_shapes_give_the_same_answers(count: int, sampling: SamplingConfig) -> None:
    """Batches and sources of a power of two, as CUDA graphs want them."""
    bucketed = TextGenerator(GENERATOR.model, TOKENIZER, GENERATOR.details, use_graphs=True)
    seen: list[tuple[int, ...]] = []
    assert bucketed.graphs is not None
    plain_call = bucketed.graphs.call

    def spy(key: Any, function: Any, *values: torch.Tensor) -> torch.Tensor:
        seen.extend(tuple(value.shape) for value in values)
        return plain_call(key, function, *values)

    bucketed.graphs.call = spy  # type: ignore[method-assign]
    sources, seeds = (SOURCES * 2)[:count], list(range(count))
    expected = GENERATOR.generate(sources, seeds=seeds, sampling=sampling)
    found = bucketed.generate(sources, seeds=seeds, sampling=sampling)
    assert [(g.tokens, g.nfe) for g in found] == [(g.tokens, g.nfe) for g in expected]
    rows = {1: 1, 3: 4, 4: 4, 5: 8}[count]
    assert seen == [(rows, 16), (rows, 16), (rows,)]


def test_whatever_changes_the_computation_has_a_graph_of_its_own() -> None:
    """A graph replays what it was captured with, so its key must tell all of that apart; here it is the function."""
    bucketed = TextGenerator(GENERATOR.model, TOKENIZER, GENERATOR.details, use_graphs=True)
    encodings, three = GENERATOR.encode(SOURCES), SamplingConfig(num_candidates=3)
    ways: list[dict[str, Any]] = [
        {},
        {"max_tokens": 4},
        {"num_steps": 2},
        {"with_log_probs": True},
        {"sampling": SamplingConfig(method="midpoint")},
        {"sampling": SamplingConfig(guidance_scale=3.0)},
        {"sampling": three},
        {"sampling": replace(three, ranking="confidence")},
    ]
    for _ in range(2):
        for way in ways:
            found, expected = (g.draw(encodings, seeds=3, **way) for g in (bucketed, GENERATOR))
            assert [d.nfe for d in found] == [d.nfe for d in expected]
            assert [[c.tokens for c in d.candidates] for d in found] == [
                [c.tokens for c in d.candidates] for d in expected
            ]
            assert [c.log_probs is None for d in found for c in d.candidates] == ["with_log_probs" not in way] * sum(
                len(d.candidates) for d in found
            )
    assert bucketed.graphs is not None and len(bucketed.graphs) == len(ways)


def test_one_length_a_source() -> None:
    with pytest.raises(ValueError, match="lengths must be one a source: got 1 for 4"):
        GENERATOR.generate(SOURCES, lengths=[3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_answer_as_the_eager_sampler_on_a_gpu(dtype: torch.dtype) -> None:
    model = randomize(build_model(tiny_config(), TOKENIZER.vocab_size, 0)).eval().to("cuda", dtype)
    details = {"task": "question_answering", "max_source_tokens": 6, "max_target_tokens": 5}
    eager, graphs = (TextGenerator(model, TOKENIZER, details, use_graphs=use) for use in (False, True))
    for seed in range(3):
        found = (g.generate(SOURCES, seeds=[seed + i for i in range(4)]) for g in (eager, graphs))
        assert len({str([g.tokens for g in answers]) for answers in found}) == 1


def test_drawing_gives_every_candidate_the_best_first() -> None:
    encodings = GENERATOR.encode(SOURCES)
    how: dict[str, Any] = {"seeds": 3, "sampling": SamplingConfig(num_candidates=4, ranking="confidence")}
    drawn = GENERATOR.draw(encodings, 3, with_log_probs=True, **how)
    for answer, first, best in zip(drawn, answers(SOURCES, seeds=3), answers(SOURCES, **how), strict=True):
        assert answer.candidates[0].tokens == best
        assert next(c.tokens for c in answer.candidates if c.number == 0) == first
        assert sorted(c.number for c in answer.candidates) == [0, 1, 2, 3]
        scores = [c.score for c in answer.candidates]
        assert scores == sorted(scores, reverse=True)
        for c in answer.candidates:
            assert c.log_probs is not None and len(c.log_probs) == len(c.experts) == len(c.tokens)
            if not c.finished:
                assert c.score == pytest.approx(sum(c.log_probs) / len(c.log_probs))


@pytest.mark.parametrize("deterministic", [False, True])
def test_drawing_can_be_watched(deterministic: bool) -> None:
    seen: dict[int, list[tuple[int, list[int]]]] = {i: [] for i in range(len(SOURCES))}

    def on_step(chosen: list[int], step: int, read: Any) -> None:
        for i, candidates in zip(chosen, read(), strict=True):
            seen[i].append((step, candidates[1].tokens))

    encodings = GENERATOR.encode(SOURCES)
    how: dict[str, Any] = {
        "seeds": [3, 1, 4, 1],
        "sampling": SamplingConfig(num_candidates=2),
        "deterministic": deterministic,
    }
    drawn = GENERATOR.draw(encodings, 4, on_step=on_step, **how)
    assert drawn == GENERATOR.draw(encodings, 4, **how)
    for i, answer in enumerate(drawn):
        assert [step for step, _ in seen[i]] == [1, 2, 3, 4]
        assert seen[i][-1][1] == next(c.tokens for c in answer.candidates if c.number == 1)
    assert any(way[0][1] != way[-1][1] for way in seen.values())


def test_few_shapes_give_the_same_candidates() -> None:
    bucketed = TextGenerator(GENERATOR.model, TOKENIZER, GENERATOR.details, use_graphs=True)
    encodings = GENERATOR.encode(SOURCES[:3])
    how: dict[str, Any] = {"seeds": [3, 1, 4], "sampling": SamplingConfig(num_candidates=3), "with_log_probs": True}
    for found, expected in zip(bucketed.draw(encodings, **how), GENERATOR.draw(encodings, **how), strict=True):
        for one, other in zip(found.candidates, expected.candidates, strict=True):
            assert (one.tokens, one.experts, one.number) == (other.tokens, other.experts, other.number)
            assert one.log_probs == pytest.approx(other.log_probs, rel=1e-4)
