"""The models of a replica: loaded when asked for, replaced when their alias moves, dropped when there are too many."""

import asyncio
import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from serve.errors import NotFound, Overloaded, ServerError
from serve.metrics import Metrics
from serve.models import Models, first_load
from serve.registry import RegistryAway, RegistryError
from serve.served_model import ServedModel
from tests.serve.conftest import models_of

CHAMPION = "models:/story@champion"


class Shelf:
    """A registry whose versions are given; models of it know their version alone."""

    def __init__(self, **aliases: str) -> None:
        self.aliases = {f"models:/{name.replace('__', '@')}": version for name, version in aliases.items()}
        self.broken: set[str] = set()
        self.away = False
        self.fault: Exception | None = None
        self.loads: list[str] = []
        self.free = threading.Event()
        self.free.set()
        self.metrics = Metrics("one")

    def current(self, address: str) -> str:
        if self.away:
            raise RegistryAway("is it running?")
        if address not in self.aliases:
            raise RegistryError(f"{address}: none")
        return self.aliases[address]

    def load(self, address: str) -> Any:
        name = self.current(address)
        self.loads.append(name)
        assert self.free.wait(10)
        if self.fault:
            raise self.fault
        if name in self.broken:
            raise RuntimeError("cannot generate")
        return model(name, self.metrics)


def model(name: str, metrics: Metrics | None = None) -> Any:
    found = SimpleNamespace(
        name=name,
        retired=False,
        batcher=SimpleNamespace(busy=False),
        engine=SimpleNamespace(ready=True),
        metrics=metrics or Metrics("one"),
    )
    found.retire = lambda: setattr(found, "retired", True)
    return found


def names(models: Models) -> list[str]:
    return list(models.all)


def test_a_name_may_be_that_of_answers_or_the_address():
    async def run() -> None:
        models = models_of({CHAMPION: model("story/3"), "/runs/world/model": model("world")})
        found = [await models.get(n, 30) for n in (None, "story/3", CHAMPION, "story@champion")]
        assert [m.name for m in found] == ["story/3"] * 4
        assert (await models.get("world", 30)).name == "world"
        with pytest.raises(NotFound, match="no model 'story/2'; there is story@champion, world"):
            await models.get("story/2", 30)

    asyncio.run(run())


def test_a_request_is_refused_unread_only_where_no_model_that_it_may_name_has_room():
    def with_room(refusal: Overloaded | None, name: str = "world") -> Any:
        found = model(name)
        found.batcher.refusal = lambda: refusal
        return found

    full, other = Overloaded("the queue is full", code="queue_full", retry_after_s=1), with_room(None, "story")
    assert models_of([with_room(full), with_room(full, "story")]).refusal() is full
    assert models_of([with_room(full), other]).refusal() is None
    assert models_of([with_room(full)], Shelf(), any_registered=True).refusal() is None


def test_a_registered_model_is_loaded_once_for_all_who_ask():
    async def run() -> None:
        shelf = Shelf(quiz__best="quiz/7")
        models = models_of([model("world")], shelf, any_registered=True)
        shelf.free.clear()
        asked = [asyncio.create_task(models.get("quiz@best", 30)) for _ in range(5)]
        with pytest.raises(Overloaded, match="is being loaded"):
            await models.get("quiz@best", timeout_s=0.01)
        shelf.free.set()
        assert {m.name for m in await asyncio.gather(*asked)} == {"quiz/7"}
        assert shelf.loads == ["quiz/7"]

    asyncio.run(run())


def test_what_the_registry_has_not_is_unknown_and_what_does_not_work_is_told():
    async def run() -> None:
        shelf = Shelf(quiz__best="quiz/7")
        shelf.broken = {"quiz/7"}
        models = models_of([model("world")], shelf, any_registered=True)
        with pytest.raises(NotFound, match="no model 'story@best'"):
            await models.get("story@best", 30)
        for _ in range(3):
            with pytest.raises(ServerError, match="'quiz@best' cannot be loaded; the log says why"):
                await models.get("quiz@best", 30)
        assert shelf.loads == ["quiz/7"]  # and not again for a while
        assert names(models) == ["world"]

    asyncio.run(run())


def test_a_registry_that_is_away_is_no_missing_model():
    async def run() -> None:
        shelf = Shelf(quiz__best="quiz/7")
        shelf.away = True
        models = models_of([model("world")], shelf, any_registered=True, retry_s=0.2)
        for _ in range(2):
            with pytest.raises(
                Overloaded, match="'quiz@best' is not in memory, and the registry cannot be read now"
            ) as told:
                await models.get("quiz@best", 30)
            assert told.value.headers == {"Retry-After": "1"} and told.value.code == "registry_unavailable"
        shelf.away = False
        await asyncio.sleep(0.25)
        assert (await models.get("quiz@best", 30)).name == "quiz/7"

    asyncio.run(run())


def test_the_registry_is_closed_unless_opened():
    async def run() -> None:
        with pytest.raises(NotFound):
            await models_of([model("world")], Shelf(quiz__best="quiz/7")).get("quiz@best", 30)

    asyncio.run(run())


def test_the_one_that_was_not_asked_for_the_longest_goes():
    async def run() -> None:
        shelf = Shelf(a__x="a/1", b__x="b/1", c__x="c/1", d__x="d/1")
        models = models_of([model("world")], shelf, any_registered=True, most=3)
        a = await models.get("a@x", 30)
        await models.get("b@x", 30)
        await models.get("a@x", 30)
        await models.get("c@x", 30)
        assert sorted(names(models)) == ["a@x", "c@x", "world"]
        a.batcher.busy = True
        await models.get("d@x", 30)
        assert sorted(names(models)) == ["a@x", "d@x", "world"]
        (await models.get("d@x", 30)).batcher.busy = True
        with pytest.raises(Overloaded, match="all 3 models in memory are needed"):
            await models.get("c@x", 30)

    asyncio.run(run())


def test_a_name_that_is_not_there_costs_no_model_its_place():
    async def ask() -> list[str]:
        models = models_of({"models:/a@x": model("a/1")}, Shelf(b__x="b/1"), any_registered=True, most=2, retry_s=0)
        await models.get("b@x", 30)
        with pytest.raises(NotFound):
            await models.get("typo@x", 30)
        return list(models.all)

    assert asyncio.run(ask()) == ["a@x", "b@x"]


def test_an_alias_that_moves_brings_the_new_version_and_ends_the_old_one():
    async def run() -> None:
        shelf = Shelf(story__champion="story/3")
        models = models_of({CHAMPION: shelf.load(CHAMPION)}, shelf)
        old = models.first
        await models.refresh()
        assert models.first is old
        shelf.aliases[CHAMPION] = "story/4"
        await models.refresh()
        assert (models.first.name, old.retired) == ("story/4", True)
        assert shelf.loads == ["story/3", "story/4"]

    asyncio.run(run())


def test_while_a_new_version_is_loaded_the_old_one_answers():
    async def run() -> None:
        shelf = Shelf(story__champion="story/3")
        models = models_of({CHAMPION: shelf.load(CHAMPION)}, shelf)
        shelf.aliases[CHAMPION] = "story/4"
        shelf.free.clear()
        refreshing = asyncio.create_task(models.refresh())
        async with asyncio.timeout(5):
            while len(shelf.loads) < 2:
                await asyncio.sleep(0.001)
        assert (await models.get(None, 30)).name == "story/3"
        shelf.free.set()
        await refreshing
        assert (await models.get(None, 30)).name == "story/4"

    asyncio.run(run())


def test_a_bad_version_is_refused_once_and_counted():
    async def run() -> None:
        shelf = Shelf(story__champion="story/3")
        first = shelf.load(CHAMPION)
        models = models_of({CHAMPION: first}, shelf)
        shelf.aliases[CHAMPION], shelf.broken = "story/4", {"story/4"}
        for _ in range(3):
            await models.refresh()
        assert models.first is first and not first.retired
        assert shelf.loads == ["story/3", "story/4"]
        assert b'yan_versions_refused_total{address="models:/story@champion",replica="one"} 1.0' in shelf.metrics.text()
        shelf.aliases[CHAMPION] = "story/5"
        await models.refresh()
        assert models.first.name == "story/5"

    asyncio.run(run())


def test_a_version_that_cannot_be_fetched_now_is_taken_at_a_later_look():
    async def run() -> None:
        shelf = Shelf(story__champion="story/3")
        models = models_of({CHAMPION: shelf.load(CHAMPION)}, shelf)
        shelf.aliases[CHAMPION] = "story/4"
        shelf.fault = RegistryAway("its files cannot be fetched")
        await models.refresh()
        assert models.first.name == "story/3"
        shelf.fault = None
        await models.refresh()
        assert models.first.name == "story/4"
        assert b"versions_refused_total{" not in shelf.metrics.text()

    asyncio.run(run())


def test_names_that_clients_are_told_outlive_the_version():
    async def run() -> None:
        shelf = Shelf(story__champion="story/3")
        models = models_of({CHAMPION: shelf.load(CHAMPION), "/runs/world/model": model("world")}, shelf)
        before = list(models.all)
        shelf.aliases[CHAMPION] = "story/4"
        await models.refresh()
        assert [(await models.get(name, 30)).name for name in before] == ["story/4", "world"]

    asyncio.run(run())


@pytest.mark.parametrize("name", ["a/1\ud800", "a/1\nforged line", "a" * 1024 + "/1", "a/1\x00"])
def test_a_name_that_no_model_has_does_not_reach_registry_or_log(name, caplog):
    shelf = Shelf()
    shelf.current = None  # type: ignore[assignment, method-assign]
    with pytest.raises(NotFound) as told:
        asyncio.run(models_of([model("world")], shelf, any_registered=True).get(name, 30))
    assert told.value.message.isprintable() and len(told.value.message) < 400 and not caplog.records


def test_an_error_that_is_told_again_keeps_no_request_in_memory():
    class Body:
        """What a request sent."""

    async def ask(models: Models) -> weakref.ref[Body]:
        body = Body()
        with pytest.raises(NotFound):
            await models.get("typo@x", 30)
        return weakref.ref(body)

    async def run() -> None:
        models = models_of([model("world")], Shelf(), any_registered=True)
        kept = [await ask(models) for _ in range(3)]
        await asyncio.sleep(0.01)  # the loop holds what it called last
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3

    asyncio.run(run())


def test_a_model_that_goes_while_its_new_version_is_loaded_leaves_none_behind():
    async def run() -> None:
        shelf = Shelf(a__x="a/1", b__x="b/1")
        models = models_of([model("world")], shelf, any_registered=True, most=2)
        old = await models.get("a@x", 30)
        made: list[Any] = []
        load = shelf.load
        shelf.load = lambda address: made.append(load(address)) or made[-1]  # type: ignore[method-assign, func-returns-value]
        shelf.aliases["models:/a@x"] = "a/2"
        shelf.free.clear()
        refreshing = asyncio.create_task(models.refresh())
        while len(shelf.loads) < 2:
            await asyncio.sleep(0.001)
        old.engine.ready = False
        asking = asyncio.create_task(models.get("a@x", 30))  # drops the old one, which does not work any more
        await asyncio.sleep(0.01)
        shelf.free.set()
        await refreshing
        assert (await asking) is made[-1] and not made[-1].retired
        assert [found.retired for found in (old, *made)] == [True] * len(made) + [False]

    asyncio.run(run())


def test_a_model_that_was_loaded_when_asked_for_and_breaks_is_loaded_anew():
    async def run() -> None:
        shelf = Shelf(a__x="a/1")
        models = models_of([model("world")], shelf, any_registered=True)
        broken = await models.get("a@x", 30)
        broken.engine.ready = False
        assert (await models.get("a@x", 30)) is not broken
        assert broken.retired

    asyncio.run(run())


def test_a_replica_that_starts_at_a_bad_version_takes_what_the_others_serve():
    """Else a service whose alias stands at a bad version could not grow, nor mend a lost replica."""
    shelf = Shelf(story__champion="story/4", **{"story/3": "story/3", "story/4": "story/4"})
    shelf.broken = {"story/4"}
    asked: list[str] = []

    def told(name: str) -> Any:
        async def elsewhere(address: str) -> str:
            asked.append(address)
            return name

        return elsewhere

    assert asyncio.run(first_load(shelf, CHAMPION, told("story/3"))).name == "story/3"
    assert shelf.loads == ["story/4", "story/3"]
    with pytest.raises(RuntimeError, match="cannot generate"):  # nobody serves it: the first start, which is to fail
        asyncio.run(first_load(shelf, CHAMPION, told("")))
    assert asked == [CHAMPION, CHAMPION]
    with pytest.raises(RuntimeError, match="cannot generate"):  # this version was asked for, and no other
        asyncio.run(first_load(shelf, "models:/story/4", told("story/3")))
    assert asked == [CHAMPION, CHAMPION]


def test_a_registry_that_is_out_of_reach_changes_nothing():
    async def run() -> None:
        shelf = Shelf(story__champion="story/3")
        models = models_of({CHAMPION: shelf.load(CHAMPION)}, shelf)
        shelf.aliases.clear()
        await models.refresh()
        assert models.first.name == "story/3"

    asyncio.run(run())


def test_a_fixed_version_is_not_looked_after():
    async def run() -> None:
        shelf = Shelf(**{"story/3": "story/3"})
        models = models_of({"models:/story/3": shelf.load("models:/story/3")}, shelf)
        shelf.aliases["models:/story/3"] = "story/9"
        await models.refresh()
        assert models.first.name == "story/3"

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions"])
def test_a_requests_deadline_counts_the_time_that_its_model_takes_to_load(start, path, monkeypatch):
    get, ask, left = Models.get, ServedModel.ask, []

    async def slow_get(self: Models, *args: Any) -> ServedModel:
        await asyncio.sleep(0.3)
        return await get(self, *args)

    async def told(self: ServedModel, sources: Any, seeds: Any, settings: Any, timeout_s: float, **more: Any) -> Any:
        left.append(timeout_s)
        return await ask(self, sources, seeds, settings, timeout_s, **more)

    monkeypatch.setattr(Models, "get", slow_get)
    monkeypatch.setattr(ServedModel, "ask", told)
    body = {"prompt" if "completions" in path else "source": "a", "timeout_s": 20}
    assert start().post(path, json=body).status_code == 200
    assert 0 < left[0] <= 19.7
