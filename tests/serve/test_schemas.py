"""Arguments and requests: what is refused, and how."""

import pytest
from pydantic import ValidationError

from serve.errors import FieldError, must_be
from serve.openai_api import COMPLETION_ALLOWED, CompletionRequest
from serve.schemas import ALLOWED, AppArgs, GenerateRequest, first_error


def refusal(body: dict) -> FieldError:
    """The error of a request body, with `loc` as FastAPI gives it."""
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate(body)
    return first_error([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()])


def test_app_args_take_the_strings_of_the_command_line():
    args = AppArgs.model_validate({"model": "m", "num_replicas": "2", "use_gpu": "true", "cpus_per_replica": "0.5"})
    assert (args.num_replicas, args.use_gpu, args.cpus_per_replica) == (2, True, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 2},
        {"num_replicas": 0},
        {"max_replicas": 1, "num_replicas": 2},
        {"num_steps": 65},
        {"model": ""},
        {"max_queued_requests": 0},
    ],
)
def test_app_args_refuse(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AppArgs.model_validate({"model": "m", **wrong})


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "source", "source is missing; give it, or else fields"),
        ({"source": "a", "fields": {"text": "a"}}, "fields", "must be null where source is given"),
        ({"fields": {"text": 3}}, "fields", "an object of texts .*, got 3"),
        ({"fields": []}, "fields", "got \\[\\]"),
        ({"source": "a", "method": "rk4"}, "method", "euler, midpoint or heun, got 'rk4'"),
        ({"source": "a", "guidance_scale": float("nan")}, "guidance_scale", "got nan"),
        ({"source": "a", "guidance_scale": float("inf")}, "guidance_scale", "got inf"),
        ({"source": "a", "guidance_scale": -1}, "guidance_scale", r"in \[0, 20\], got -1"),
        ({"source": "a", "num_candidates": 33}, "num_candidates", r"in \[1, 32\], got 33"),
        ({"source": "a", "num_candidates": 2, "stream": True}, "num_candidates", "must be 1 with stream"),
        ({"source": "a", "timeout_s": 0}, "timeout_s", "got 0"),
        ({"source": "a", "max_tokens": 10**9, "stream": "yes"}, "stream", "got 'yes'"),
        ({"source": ""}, "source", "source must be text in Unicode that is not blank, got ''"),
        ({"source": " \n"}, "source", "not blank"),
        ({"source": 3}, "source", "got 3"),
        ({"source": "\ud800"}, "source", "got '.ud800'"),
        ({"source": "a", "num_steps": 0}, "num_steps", r"in \[1, 64\], got 0"),
        ({"source": "a", "num_steps": 65}, "num_steps", r"in \[1, 64\], got 65"),
        ({"source": "a", "num_steps": "3"}, "num_steps", "got '3'"),
        ({"source": "a", "num_steps": True}, "num_steps", "got True"),
        ({"source": "a", "num_steps": 2.0}, "num_steps", "got 2.0"),
        ({"source": "a", "seed": -1}, "seed", "got -1"),
        ({"source": "a", "seed": 2**63}, "seed", "got 9223372036854775808"),
        ({"source": "a", "seed": float("nan")}, "seed", "got nan"),
        ({"source": "a", "seed": None}, "seed", "got None"),
        ({"source": "a", "max_tokens": 0}, "max_tokens", "got 0"),
        ({"source": "a", "max_token": 3}, "max_token", "did you mean 'max_tokens'"),
    ],
)
def test_request_refusals_name_the_field(body, field, message):
    error = refusal(body)
    assert error.param == field
    assert error.allowed
    with pytest.raises(FieldError, match=message):
        raise error


def test_request_takes_the_ends_of_every_range():
    request = GenerateRequest(source="a", seed=2**63 - 1, num_steps=64, max_tokens=1)
    assert request.seed == 2**63 - 1
    assert GenerateRequest(source="a", num_steps=1).max_tokens is None


def test_messages_stay_short():
    assert len(must_be("source", "short", "x" * 10_000).message) < 120


def test_every_field_of_a_request_is_described():
    assert set(ALLOWED) == set(GenerateRequest.model_fields)
    assert set(COMPLETION_ALLOWED) >= set(CompletionRequest.model_fields)
    for request in (GenerateRequest, CompletionRequest, AppArgs):
        assert all(field.description for field in request.model_fields.values())
