"""Requests made from the API's own description, right ones and wrong ones: no failure of the server's own, ever."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import Counter
from typing import Any

import hypothesis
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase

# Left out: a schema cannot say that a model has a name, or that fields are those of its task.
from schemathesis.specs.openapi.checks import positive_data_acceptance

RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


def cases(operation: Any, mode: schemathesis.GenerationMode, most: int) -> list[Any]:
    """Requests of one operation, always the same ones."""
    found: list[Any] = []

    @hypothesis.settings(
        max_examples=most,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        database=None,
        derandomize=True,
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        found.append(case)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # such as a wrong request to a route that takes anything
        one()
    return found


def fuzz(api: Any, most: int) -> tuple[Counter[int], dict[str, str]]:
    """Statuses of the answers to so many cases of each operation, right and wrong; and what was wrong with answers.

    A request that wants its answer in less time than any takes has status 503, which is right.
    """
    statuses: Counter[int] = Counter()
    wrong: dict[str, str] = {}
    for operation in schemathesis.openapi.from_asgi("/openapi.json", api).get_all_operations():
        for mode in (RIGHT, WRONG):
            for case in cases(operation.ok(), mode, most):
                if mode is RIGHT and isinstance(case.body, dict):
                    case.body.pop("model", None)  # no made-up name is that of a model
                answer = case.call()
                statuses[answer.status_code] += 1
                if answer.status_code == 503:
                    assert 0 < case.body["timeout_s"] < 0.1 and answer.json()["error"]["code"] == "deadline_exceeded"
                    continue
                try:
                    case.validate_response(answer, excluded_checks=[positive_data_acceptance])
                except (Exception, BaseExceptionGroup) as error:
                    for found in getattr(error, "exceptions", [error]):
                        wrong.setdefault(f"{case.method} {case.path} {type(found).__name__}", str(found)[:2000])
    return statuses, wrong


@pytest.fixture
def api(start: Any, tmp_path: Any) -> Any:
    return start(access_log=str(tmp_path / "access.jsonl"), max_queued_requests=32).app


def test_no_request_made_from_the_schema_breaks_the_server(api: Any):
    statuses, wrong = fuzz(api, 40)
    assert wrong == {}
    assert not [status for status in statuses if status >= 500 and status != 503]
    assert statuses[200] > 20 and sum(count for status, count in statuses.items() if 400 <= status < 500) > 50


@pytest.mark.soak
def test_two_thousand_requests_made_from_the_schema(api: Any):
    statuses, wrong = fuzz(api, 600)
    assert wrong == {}
    assert sum(statuses.values()) >= 2000
    assert not [status for status in statuses if status >= 500 and status != 503]


@pytest.mark.soak
def test_memory_stays_flat_over_ten_thousand_requests(start: Any, tmp_path: Any):
    client = start(access_log=str(tmp_path / "access.jsonl"))
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def ask(count: int) -> float:
        for i in range(count):
            body = {"source": "Where is Mary? " * (1 + i % 7), "seed": i, "num_candidates": 1 + i % 2}
            assert client.post("/v1/generate", json=body).status_code == 200
        gc.collect()
        return psutil.Process().memory_info().rss / 1e6

    first = ask(2000)
    assert ask(8000) - first < 20
