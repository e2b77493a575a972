"""OpenAI's completions over a model in this process: what its fields do, and what is refused by name."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.openai_api import ending
from serve.served_model import Text
from tests.serve.conftest import save_tiny
from yan_core.config import BaselineConfig
from yan_core.generator import Candidate

QUESTION = "Where is Mary?"


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    """A completion that must work."""
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": QUESTION, "seed": 3, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that must end as it should."""
    body = {"model": "tiny", "prompt": QUESTION, "seed": 3, "stream": True, **body}
    answer = client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, last, end = answer.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_completion_is_the_answer_of_our_own_route(client):
    found = complete(client)
    ours = client.post("/v1/generate", json={"source": QUESTION, "seed": 3}).json()
    (choice,) = found["choices"]
    assert choice == {
        "index": 0,
        "text": ours["text"],
        "logprobs": None,
        "finish_reason": "stop" if ours["finished"] else "length",
    }
    count = len(ours["tokens"])
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": count, "total_tokens": 4 + count}
    assert found["object"] == "text_completion" and found["model"] == "tiny" and found["id"].startswith("cmpl-")


def test_several_prompts_and_several_answers_are_in_order(client):
    found = complete(client, prompt=[QUESTION, "apple"], n=2)["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    first, second = (complete(client, prompt=prompt, n=2)["choices"] for prompt in (QUESTION, "apple"))
    assert [choice["text"] for choice in found] == [choice["text"] for choice in [*first, *second]]


def test_best_of_gives_the_likeliest(client):
    drawn = complete(client, n=8, logprobs=0, max_tokens=4)["choices"]
    best = complete(client, n=2, best_of=8)["choices"]
    assert [choice["text"] for choice in best] == [choice["text"] for choice in drawn[:2]]

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    whole = [mean(choice) for choice in drawn if choice["finish_reason"] == "length"]  # else its end counts too
    assert len(whole) > 3 and whole == sorted(whole, reverse=True)


def test_a_seed_decides_and_none_is_chance(client):
    assert complete(client, n=3)["choices"] == complete(client, n=3)["choices"]
    assert complete(client, seed=-1)["choices"] == complete(client, seed=-1)["choices"]
    texts = {complete(client, seed=None)["choices"][0]["text"] for _ in range(12)}
    assert len(texts) > 2


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 64])
def test_max_tokens_gives_the_start_of_the_same_text(client, max_tokens):
    for seed in range(8):
        (whole,), (cut,) = (complete(client, seed=seed, **more)["choices"] for more in ({}, {"max_tokens": max_tokens}))
        assert whole["text"].startswith(cut["text"])
        assert max_tokens < 4 or cut == whole
    assert complete(client, max_tokens=1)["usage"]["completion_tokens"] <= 1


PIECES = Text("the cat sat.", Candidate([1, 2, 3, 4], [0] * 4, True), ["the", " cat", " sat", "."])


@pytest.mark.parametrize(
    ("max_tokens", "stop", "expected"),
    [
        (None, [], ("the cat sat.", 4, "stop")),
        (9, [], ("the cat sat.", 4, "stop")),
        (2, [], ("the cat", 2, "length")),
        (None, [" sat"], ("the cat", 2, "stop")),
        (None, ["at"], ("the c", 2, "stop")),
        (None, ["sat", "cat"], ("the ", 2, "stop")),
        (None, ["the"], ("", 0, "stop")),
        (2, ["sat"], ("the cat", 2, "length")),
        (None, ["dog"], ("the cat sat.", 4, "stop")),
    ],
)
def test_where_an_answer_ends(max_tokens, stop, expected):
    end = ending(PIECES, max_tokens, stop)
    assert (end.text, end.tokens, end.reason) == expected


def test_a_stop_text_ends_the_answer_before_it(client):
    whole = next(text for seed in range(50) if " " in (text := complete(client, seed=seed)["choices"][0]["text"]))
    seed = next(seed for seed in range(50) if complete(client, seed=seed)["choices"][0]["text"] == whole)
    for stop in (" ", [" ", "zebra"]):
        (choice,) = complete(client, seed=seed, stop=stop)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole.partition(" ")[0], "stop")


def test_echo_gives_the_prompt_before(client):
    text = complete(client)["choices"][0]["text"]
    assert complete(client, echo=True)["choices"][0]["text"] == f"{QUESTION} {text}"


@pytest.mark.parametrize("logprobs", [0, 1])
def test_log_probabilities_are_told_token_by_token(client, logprobs):
    (choice,) = complete(client, logprobs=logprobs)["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert all(value <= 0 for value in told["token_logprobs"])
    assert all(
        choice["text"][start:].startswith(token)
        for start, token in zip(told["text_offset"], told["tokens"], strict=True)
    )
    expected = [{token: value} for token, value in zip(told["tokens"], told["token_logprobs"], strict=True)]
    assert told["top_logprobs"] == (expected if logprobs else None)


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"echo": True}, {"logprobs": 1}, {"prompt": [QUESTION, "apple"]}])
def test_a_stream_is_the_same_text_in_pieces(client, more):
    whole, parts = complete(client, **more), chunks(client, **more)
    assert len({part["id"] for part in parts}) == 1 and all("usage" not in part for part in parts)
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if choice["logprobs"]:
            values = [value for part in mine if part["logprobs"] for value in part["logprobs"]["token_logprobs"]]
            assert values == choice["logprobs"]["token_logprobs"]


def test_a_stream_tells_its_usage_if_asked(client):
    *parts, last = chunks(client, stream_options={"include_usage": True})
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == [] and last["usage"] == complete(client)["usage"]


def test_neutral_values_pass(client):
    neutral = {
        "temperature": 1,
        "top_p": 1.0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "someone",
        "suffix": None,
        "n": 1,
        "best_of": None,
        "stop": None,
        "stream": False,
        "stream_options": None,
        "logprobs": None,
        "echo": False,
    }
    assert complete(client, **neutral)["choices"] == complete(client)["choices"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temperature": 0.7}, "temperature", "must be 1 or null: a flow has no temperature"),
        ({"temperature": float("nan")}, "temperature", "got nan"),
        ({"top_p": 0.9}, "top_p", "must be 1 or null"),
        ({"presence_penalty": 1}, "presence_penalty", "must be 0 or null"),
        ({"frequency_penalty": -1}, "frequency_penalty", "must be 0 or null"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "must be {} or null"),
        ({"prompt": [1, 2]}, "prompt", "token ids are not taken"),
        ({"prompt": [[1, 2]]}, "prompt", "token ids are not taken"),
        ({"prompt": []}, "prompt", "list of such texts"),
        ({"prompt": ""}, "prompt", "not blank"),
        ({"prompt": ["a", " "]}, "prompt", "not blank"),
        ({"prompt": None}, "prompt", "got None"),
        ({"n": 0}, "n", "in [1, 32], got 0"),
        ({"n": 3, "best_of": 2}, "best_of", "must be >= n=3, got 2"),
        ({"n": 33}, "n", "got 33"),
        ({"logprobs": 5}, "logprobs", "null, 0 or 1"),
        ({"logprobs": 1, "echo": True}, "logprobs", "must be null with echo"),
        ({"suffix": "b"}, "suffix", "for models of the task infilling, tiny is one of question_answering"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "not empty"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"max_tokens": 10**9}, "max_tokens", "in [1, 64], got 1000000000"),
        ({"seed": 2**63}, "seed", "got 9223372036854775808"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "must be null without stream"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "include_usage"),
        ({"prompt": "Mary " * 39 + "Mary"}, "prompt", "at most 32 tokens, got 40"),
        ({"prompt": ["a"] * 500}, "prompt", "take 18000 tokens"),
        ({"messages": []}, "messages", "unknown name 'messages'"),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(client, body, param, message):
    content = json.dumps({"prompt": QUESTION, **body})  # NaN too
    answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_suffix_makes_an_infilling(start, tmp_path):
    client = start(save_tiny(tmp_path / "model", task="infilling"))
    found = complete(client, prompt="Mary went to", suffix="kitchen.")
    ours = client.post("/v1/generate", json={"fields": {"text": "Mary went to <mask> kitchen."}, "seed": 3}).json()
    assert found["choices"][0]["text"] == ours["text"]
    answer = client.post("/v1/completions", json={"prompt": "a <mask>", "suffix": "b"})
    assert answer.status_code == 400 and "must not hold <mask>" in answer.json()["error"]["message"]


def test_models_are_listed_and_shown(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["owned_by"], card["task"]) == (
        "tiny",
        "model",
        "yan",
        "question_answering",
    )
    assert card["version"] == "tiny" and client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/ti%2Fny").json()["error"]["code"] == "model_not_found"


def test_half_a_surrogate_pair_in_a_suffix_is_refused(start, tmp_path):
    client = start(save_tiny(tmp_path / "infilling" / "model", task="infilling"))
    body, kind = b'{"prompt": "Mary went", "suffix": "\\ud800"}', {"Content-Type": "application/json"}
    answer = client.post("/v1/completions", content=body, headers=kind)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "suffix")
    for suffix in ("", " home."):
        assert client.post("/v1/completions", json={"prompt": "Mary went", "suffix": suffix}).status_code == 200


def test_what_is_too_much_is_named_as_openai_names_it(start):
    answer = start(max_batch_tokens=64).post("/v1/completions", json={"prompt": QUESTION, "n": 32})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"prompt": QUESTION, "logprobs": 1}, "logprobs"),
        ("/v1/completions", {"prompt": QUESTION, "n": 2}, "n"),
        ("/v1/completions", {"prompt": QUESTION, "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": "a" * 20_001}, "prompt"),
        ("/v1/generate", {"source": QUESTION, "trajectory": True}, "trajectory"),
        ("/v1/generate", {"source": QUESTION, "stream": True}, "stream"),
        ("/v1/generate", {"fields": {"context": "a" * 20_001, "question": QUESTION}}, "fields"),
    ],
)
def test_a_refusal_of_the_models_calls_a_field_as_the_request_does(start, tmp_path, path, body, name):
    shape = BaselineConfig(family="masked_diffusion", d_model=16, num_blocks=1, max_positions=48)
    error = start(save_tiny(tmp_path / "model", architecture=shape)).post(path, json=body).json()["error"]
    assert error["param"] == name and error["message"].startswith(f"{name} ")


def test_stream_options_that_their_client_knows_pass_at_neutral_values(client):
    found = chunks(client, stream_options={"include_usage": True, "include_obfuscation": False})
    assert found[-1]["usage"]["total_tokens"] > 0
    body = {"prompt": QUESTION, "stream": True, "stream_options": {"include_obfuscation": True}}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400 and "include_obfuscation" in answer.text


def test_a_page_of_a_named_origin_may_send_what_openais_client_sends(start):
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,x-stainless-retry-count",
    }
    client = start(cors_origins=("https://a.example",))
    assert client.options("/v1/completions", headers=asked).status_code == 200
    assert client.options("/v1/completions", headers=asked | {"Origin": "https://b.example"}).status_code == 400
