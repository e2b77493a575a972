"""Requests made from the API's own description, right ones and wrong ones: no failure of the server's own, ever."""

from __future__ import annotations

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


def fuzz(api: Any, examples: int) -> tuple[Counter[int], dict[str, str]]:
    """Statuses of the answers to so many cases of each operation, right and wrong; and what was wrong with answers."""
    statuses: Counter[int] = Counter()
    wrong: dict[str, str] = {}
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    for operation in schema.get_all_operations():
        known = operation.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            right = mode is schemathesis.GenerationMode.POSITIVE

            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
                database=None,
                derandomize=True,
            )
            @hypothesis.given(case=known.as_strategy(generation_mode=mode))
            def one(case: Any, right: bool = right) -> None:
                if right and isinstance(case.body, dict):
                    case.body.pop("model", None)  # no made-up name is that of a model
                answer = case.call()
                statuses[answer.status_code] += 1
                try:
                    case.validate_response(answer, excluded_checks=[positive_data_acceptance])
                except (Exception, BaseExceptionGroup) as error:
                    for found in getattr(error, "exceptions", [error]):
                        wrong.setdefault(f"{case.method} {case.path} {type(found).__name__}", str(found)[:2000])

            try:
                one()
            except hypothesis.errors.Unsatisfiable:
                continue  # such as a wrong request to a route that takes anything
    return statuses, wrong


@pytest.fixture
def api(start: Any, tmp_path: Any) -> Any:
    return start(access_log=str(tmp_path / "access.jsonl"), max_queued_requests=32).app


def test_no_request_made_from_the_schema_breaks_the_server(api: Any):
    statuses, wrong = fuzz(api, 40)
    assert wrong == {}
    assert not [status for status in statuses if status >= 500]
    assert statuses[200] > 20 and sum(count for status, count in statuses.items() if 400 <= status < 500) > 50


@pytest.mark.soak
def test_two_thousand_requests_made_from_the_schema(api: Any):
    statuses, wrong = fuzz(api, 600)
    assert wrong == {}
    assert sum(statuses.values()) >= 2000
    assert not [status for status in statuses if status >= 500]


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
