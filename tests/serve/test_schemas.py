"""Arguments and requests: what is refused, and how."""

import pickle

import pytest
from pydantic import ValidationError

from serve.schemas import AppArgs, FieldError, GenerateRequest, GenerateResponse, first_error, must_be


def refusal(body: dict) -> FieldError:
    """The error of a request body, with `loc` as FastAPI gives it."""
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate(body)
    return first_error([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()])


def test_app_args_take_the_strings_of_the_command_line():
    args = AppArgs.model_validate({"model": "m", "num_replicas": "2", "use_gpu": "true", "cpus_per_replica": "0.5"})
    assert (args.num_replicas, args.use_gpu, args.cpus_per_replica) == (2, True, 0.5)


def test_app_args_defaults_fit_each_other():
    args = AppArgs(model="m")
    assert args.max_ongoing_requests >= args.max_batch_size
    assert (args.num_replicas, args.max_batch_size, args.batch_wait_ms, args.num_steps) == (1, 32, 2, 3)


def test_app_args_refuse_batches_that_could_never_fill():
    with pytest.raises(ValidationError, match="max_ongoing_requests must be >= max_batch_size=32, got 8"):
        AppArgs(model="m", max_ongoing_requests=8)


@pytest.mark.parametrize("wrong", [{"replicas": 2}, {"num_replicas": 0}, {"num_steps": 65}, {"model": ""}])
def test_app_args_refuse(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AppArgs.model_validate({"model": "m", **wrong})


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "source", "source is missing"),
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
    assert error.field == field
    assert error.allowed
    with pytest.raises(FieldError, match=message):
        raise error


def test_request_takes_the_ends_of_every_range():
    request = GenerateRequest(source="a", seed=2**63 - 1, num_steps=64, max_tokens=1)
    assert request.seed == 2**63 - 1
    assert GenerateRequest(source="a", num_steps=1).max_tokens is None


def test_messages_stay_short():
    assert len(must_be("source", "short", "x" * 10_000).message) < 120


def test_field_error_survives_pickling():
    error = pickle.loads(pickle.dumps(FieldError("seed", "seed is wrong", "right ones")))
    assert (error.field, error.message, error.allowed, str(error)) == (
        "seed",
        "seed is wrong",
        "right ones",
        "seed is wrong",
    )


def test_response_holds_what_the_api_promises():
    assert set(GenerateResponse.model_fields) == {
        "text",
        "tokens",
        "num_steps",
        "nfe",
        "latency_ms",
        "source_tokens",
        "source_tokens_cut",
        "finished",
        "model",
    }
