"""Who may ask: bearer tokens, of which the server holds SHA-256 hashes alone."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger("ray.serve")

ENVIRONMENT = "YAN_API_KEYS_FILE"
"""Names the file of keys where the app's arguments name none."""
SETTLED_S = 0.5
"""A file of keys that has changed is taken once it is the same after so long."""
ANYONE = "anyone"
"""Name of whoever asks a server without keys."""


def keys_file(named: str = "") -> str:
    """Absolute path of the file of keys: the one named, else the environment's; empty: there is none.

    Raises:
        ValueError: If keys are where they were once read, and would now let anyone in.
    """
    if os.environ.get("YAN_API_KEYS") and not named:
        raise ValueError(f"YAN_API_KEYS is no longer read: put its lines into a file and name that in {ENVIRONMENT}")
    file = named or os.environ.get(ENVIRONMENT, "")
    return str(Path(file).expanduser().absolute()) if file else ""


def load_keys(file: str = "") -> dict[str, str]:
    """SHA-256 hashes, in hexadecimal digits, by the names of their owners.

    Args:
        file: Lines `name sha256`; what follows a `#` does not count. Empty: the environment's, see `keys_file`.

    Returns:
        Empty: there is no file, and anyone may ask.

    Raises:
        ValueError: If the file cannot be read, a line is something else, or there is none; nothing of a line that could
            be a key is repeated.
    """
    if not (file := keys_file(file)):
        return {}
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"api_keys_file={file} (yan serve --api-keys-file, or {ENVIRONMENT}) cannot be read: {reason}"
        ) from None
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch(r"[0-9a-f]{64}", words[1]) or words[0] in keys:
            raise ValueError(
                f"line {number} of {file} must be a name of its own and the SHA-256 of a key in 64 digits, such as "
                "`printf %s KEY | sha256sum` gives"
            )
        keys[words[0]] = words[1]
    if not keys:
        raise ValueError(f"api_keys_file={file} holds no key")
    return keys


async def keep_keys(keys: dict[str, str], file: str, every_s: float) -> None:
    """Take up, for ever, what changes in the file of keys; one that is broken or gone leaves them as they were.

    Args:
        keys: From `load_keys`; changed in place.
        file: Where they are.
        every_s: Seconds between two looks.
    """
    told = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            found = await asyncio.to_thread(load_keys, file)
            while found != keys:  # a file that is being written may end at the end of a line
                await asyncio.sleep(SETTLED_S)
                before, found = found, await asyncio.to_thread(load_keys, file)
                if found == before:
                    break
        except ValueError as error:
            if str(error) != told:
                logger.error("the keys stay as they were: %s", error)
            told = str(error)
            continue
        told = ""
        if found != keys:
            keys.clear()
            keys.update(found)
            logger.info("the file of keys has changed: %s may ask", ", ".join(keys))


def owner(keys: Mapping[str, str], authorization: str | None) -> str | None:
    """Name of the owner of a bearer token; None: nobody's.

    Each hash is looked at to its end, whichever fits: the time says nothing.

    Args:
        keys: From `load_keys`; empty: anyone may ask.
        authorization: The header `Authorization`.
    """
    if not keys:
        return ANYONE
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        return None
    presented = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
    found = None
    for name, expected in keys.items():
        if hmac.compare_digest(presented, expected):
            found = name
    return found


def refuse_open_server(host: str, keys: Mapping[str, str]) -> None:
    """A server that other machines reach wants keys.

    Raises:
        ValueError: If it has none.
    """
    if not keys and not is_loopback(host):
        raise ValueError(
            f"host={host} opens the server to other machines, and anyone could use it: name keys in api_keys_file "
            f"(yan serve --api-keys-file FILE, or {ENVIRONMENT}=FILE), or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
