"""The models of a replica by name: some from the start, others of the registry when they are first asked for.

A model of the registry that is named by an alias follows it: when the alias moves, the new version is loaded and warmed
up beside the old one, then takes its place for what comes; what the old one has begun it ends. A version that cannot be
loaded or cannot generate is refused, and the old one stays.

Not Serve's multiplexing, which routes by a header at Serve's own proxy: HAProxy hands requests to replicas directly.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from serve.errors import NotFound, Overloaded, RequestError, ServerError, shown
from serve.registry import SCHEME, RegistryAway, RegistryError, is_registered
from serve.served_model import ServedModel

logger = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_NAME = 1024
"""Characters of an address that the registry is asked for; in MLflow name and alias have at most 256 each."""


class Source(Protocol):
    """Where models come from; its methods block."""

    def load(self, address: str) -> ServedModel:
        """Load a model and generate with it; raises whatever is wrong."""
        ...

    def current(self, address: str) -> str:
        """Name of the version that an address of the registry stands for now.

        Raises:
            RegistryError: If it is not there.
            RegistryAway: If the registry cannot be read.
        """
        ...


@dataclass
class _Held:
    model: ServedModel
    pinned: bool
    used_s: float = field(default_factory=time.monotonic)
    refused: str = ""
    """The version that its alias stands for and that does not work."""


def _is_alias(address: str) -> bool:
    return is_registered(address) and "@" in address


async def first_load(source: Source, address: str, elsewhere: Callable[[str], Awaitable[str]]) -> ServedModel:
    """A model of a replica that starts.

    Args:
        source: Where it comes from.
        address: Of the model. Where it is an alias at a version that does not work, the replica starts with what others
            serve by it, as those go on with that: else there would be no replica more until somebody moves the alias.
        elsewhere: Asks them for its name; empty: there are none.

    Raises:
        Exception: Whatever is wrong with the model.
    """
    try:
        return await asyncio.to_thread(source.load, address)
    except Exception:
        name = await elsewhere(address) if _is_alias(address) else ""
        if not name:
            raise
        logger.exception("%s is refused: this replica starts with %s, which others serve", address, name)
    return await asyncio.to_thread(source.load, SCHEME + name)


class Models:
    """All models of a replica; its methods run on one event loop."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        source: Source,
        *,
        any_registered: bool,
        most: int,
        retry_s: float,
    ) -> None:
        """Hold at least one; the first is the one that answers requests which name none.

        Args:
            models: Those that stay, by address.
            source: Where others and newer versions come from.
            any_registered: Whether a request may name any model of the registry.
            most: Most models in memory; then the one that was not asked for the longest goes.
            retry_s: A model that could not be loaded is not tried again for so long.
        """
        self._held = {address: _Held(model, pinned=True) for address, model in models.items()}
        self._source, self._any_registered, self._most, self._retry_s = source, any_registered, most, retry_s
        self._first = next(iter(self._held.values()))
        self._loading: dict[str, asyncio.Task[_Held]] = {}
        self._failed: dict[str, tuple[float, Callable[[], RequestError]]] = {}  # made anew: an error holds its request
        self._one_at_a_time = asyncio.Lock()  # there is memory for one more, not for any number
        self._loader = ThreadPoolExecutor(1, "load")

    @property
    def all(self) -> dict[str, ServedModel]:
        """The models in memory by the names that requests can rely on: an alias stays where it moves."""
        return {
            address.removeprefix(SCHEME) if _is_alias(address) else held.model.name: held.model
            for address, held in self._held.items()
        }

    @property
    def first(self) -> ServedModel:
        """The model of requests that name none."""
        return self._first.model

    @property
    def ready(self) -> bool:
        """Whether every model that stays answers."""
        return all(held.model.engine.ready for held in self._held.values() if held.pinned)

    def refusal(self) -> Overloaded | None:
        """What any request would be told now, whichever model it names; None: that depends."""
        if self._any_registered:
            return None
        refusals = [held.model.batcher.refusal() for held in self._held.values()]
        return None if None in refusals else refusals[0]

    async def get(self, name: str | None, timeout_s: float) -> ServedModel:
        """The model of a name: that of its answers while it is in memory, or its address with or without `models:/`.

        Args:
            name: None: the first.
            timeout_s: How long it may take to load.

        Raises:
            NotFound: If there is none.
            Overloaded: If there is no room for it now, the registry cannot be read, or it takes too long.
            ServerError: If it cannot be loaded.
        """
        if name is None:
            return self.first
        held = self._find(name)
        # Others would go on to the registry and into the log.
        if held is None and self._any_registered and len(name) <= LONGEST_NAME and name.isprintable():
            address = name if is_registered(name) else SCHEME + name
            try:
                async with asyncio.timeout(timeout_s):
                    held = await self._loaded(address)
            except TimeoutError:
                raise Overloaded(f"{name} is being loaded; come again", code="loading", retry_after_s=1) from None
        if held is None:
            raise self._unknown(name)
        held.used_s = time.monotonic()
        return held.model

    def named_by(self, address: str) -> str:
        """Name of the model that stands for an address; empty: there is none in memory."""
        return self._held[address].model.name if address in self._held else ""

    def _find(self, name: str) -> _Held | None:
        called = (address for address, held in self._held.items() if held.model.name == name)
        address = next((address for address in (name, SCHEME + name, *called) if address in self._held), None)
        if address is None:
            return None
        held = self._held[address]
        if not held.pinned and not held.model.engine.ready:  # one that stays is for Serve to replace, with its replica
            self._drop(address)
            return None
        return held

    def _drop(self, address: str) -> None:
        self._held.pop(address).model.retire()

    def _unknown(self, name: str) -> NotFound:
        known = sorted(self.all)
        return NotFound(
            f"there is no model {shown(name)}; there is {', '.join(known)}",
            param="model",
            code="model_not_found",
            allowed=known,
        )

    async def _loaded(self, address: str) -> _Held:
        """Load a model, once for all who wait for it."""
        until, error = self._failed.get(address, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error()
        if address not in self._loading:
            self._loading[address] = asyncio.create_task(self._load(address))
        return await asyncio.shield(self._loading[address])  # who leaves does not take it along

    async def _load(self, address: str) -> _Held:
        name = address.removeprefix(SCHEME)
        error: Callable[[], RequestError]
        try:
            async with self._one_at_a_time:
                await self._in_thread(self._source.current, address)  # no model makes room for one that is not there
                self._make_room()
                model = await self._in_thread(self._source.load, address)
                held = self._held[address] = _Held(model, pinned=False)
                return held
        except Overloaded:
            raise
        except RegistryAway as away:
            logger.warning("%s was asked for: %s", address, away)
            error = partial(
                Overloaded,
                f"{shown(name)} is not in memory, and the registry cannot be read now; come again later",
                code="registry_unavailable",
                retry_after_s=max(1, math.ceil(self._retry_s)),
            )
        except RegistryError as missing:
            logger.info("%s was asked for: %s", address, missing)
            error = partial(self._unknown, name)
        except Exception:
            logger.exception("%s cannot be served", address)
            error = partial(
                ServerError, f"model {shown(name)} cannot be loaded; the log says why", code="model_not_loaded"
            )
        finally:
            self._loading.pop(address, None)
        if len(self._failed) >= 1000:
            self._failed.clear()
        self._failed[address] = (time.monotonic() + self._retry_s, error)
        raise error()

    def _make_room(self) -> None:
        """Let the model go that was not asked for the longest, if there are too many.

        Raises:
            Overloaded: If all of them are at work or stay.
        """
        if len(self._held) < self._most:
            return
        free = [
            (held.used_s, address)
            for address, held in self._held.items()
            if not held.pinned and not held.model.batcher.busy
        ]
        if not free:
            raise Overloaded(
                f"all {self._most} models in memory are needed; come again later", code="models_full", retry_after_s=5
            )
        self._drop(min(free)[1])

    async def refresh(self) -> None:
        """Look where the aliases point, and put new versions in the place of old ones."""
        for address in filter(_is_alias, list(self._held)):
            async with self._one_at_a_time:
                if address in self._held:
                    await self._refresh(address, self._held[address])

    async def _refresh(self, address: str, held: _Held) -> None:
        try:
            name = await self._in_thread(self._source.current, address)
        except RegistryError as error:
            logger.warning("%s stays what it is: %s", address, error)
            return
        if name in (held.model.name, held.refused):
            return
        try:
            model = await self._in_thread(self._source.load, address)
        except RegistryAway as error:  # no fault of the version's: the next look may bring it
            logger.warning("%s goes on serving %s, %s cannot be fetched now: %s", address, held.model.name, name, error)
        except Exception:
            held.refused = name
            held.model.metrics.refused(address)
            logger.exception("%s is refused, %s goes on serving %s", name, address, held.model.name)
        else:
            old, held.model, held.refused = held.model, model, ""
            old.retire()
            if self._held.get(address) is not held:  # dropped meanwhile
                model.retire()
            logger.info("%s: %s takes the place of %s", address, model.name, old.name)

    async def keep_fresh(self, every_s: float) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except Exception:  # the next look may work
                logger.exception("the registry could not be looked at")

    async def _in_thread(self, function: Callable[[str], T], address: str) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, function, address)
