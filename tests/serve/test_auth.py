"""Keys: how they are read, what is compared, and where they are a must."""

import asyncio
import hashlib

import pytest

from serve import auth
from serve.auth import ANYONE, is_loopback, keep_keys, load_keys, owner, refuse_open_server


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = {"ann": digest("secret-a"), "bob": digest("secret-b")}


def test_keys_of_a_file_and_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("YAN_API_KEYS_FILE", raising=False)
    assert load_keys() == {}
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\nann {KEYS['ann']}  # since May\nbob\t{KEYS['bob']}\n")
    assert load_keys(str(file)) == KEYS
    monkeypatch.setenv("YAN_API_KEYS_FILE", "~/keys")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_keys() == KEYS
    (tmp_path / "own").write_text(f"cid {KEYS['ann']}\n")
    assert load_keys(str(tmp_path / "own")) == {"cid": KEYS["ann"]}


@pytest.mark.parametrize(
    "lines", ["ann secret-a", "ann", f"ann {'A' * 64}", f"ann {'a' * 64}\nann {'b' * 64}", f"ann {'a' * 64} x"]
)
def test_a_line_that_is_no_hash_is_refused_without_repeating_what_may_be_a_key(tmp_path, lines):
    file = tmp_path / "keys"
    file.write_text(lines)
    with pytest.raises(ValueError, match=r"line \d of .* must be a name of its own and the SHA-256") as caught:
        load_keys(str(file))
    assert "secret-a" not in str(caught.value)


def test_a_file_that_protects_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_keys(str(tmp_path / "nowhere"))
    (tmp_path / "keys").write_text("# nobody yet\n")
    with pytest.raises(ValueError, match="holds no key"):
        load_keys(str(tmp_path / "keys"))


def test_keys_where_they_were_once_read_are_refused_and_not_left_out(monkeypatch, tmp_path):
    """A server on loopback behind a TLS proxy would be open to all."""
    monkeypatch.setenv("YAN_API_KEYS", f"ann {KEYS['ann']}")
    with pytest.raises(ValueError, match="YAN_API_KEYS is no longer read: .* name that in YAN_API_KEYS_FILE"):
        load_keys()
    (tmp_path / "keys").write_text(f"ann {KEYS['ann']}\n")
    assert load_keys(str(tmp_path / "keys")) == {"ann": KEYS["ann"]}


def test_a_change_of_the_file_is_taken_up_and_a_broken_file_is_not(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("serve.auth.SETTLED_S", 0.01)
    file = tmp_path / "keys"
    line = {name: f"{name} {hashed}\n" for name, hashed in KEYS.items()}

    async def seen(text: str | None) -> dict[str, str]:
        """The keys after the file has become that."""
        file.unlink() if text is None else file.write_text(text)
        await asyncio.sleep(0.2)
        return dict(keys)

    async def rotate() -> list[dict[str, str]]:
        task = asyncio.create_task(keep_keys(keys, str(file), 0.01))
        states = (line["ann"] + line["bob"], line["bob"], "", "bob secret-b", None, line["ann"])
        found = [await seen(text) for text in states]
        task.cancel()
        return found

    file.write_text(line["ann"])
    keys = load_keys(str(file))
    bob, ann = {"bob": KEYS["bob"]}, {"ann": KEYS["ann"]}
    assert asyncio.run(rotate()) == [KEYS, bob, bob, bob, bob, ann]
    told = [record.message for record in caplog.records if "stay as they were" in record.message]
    assert len(told) == 3 and "secret-b" not in "".join(told)  # once for each, not at every look


def test_a_file_that_is_half_written_takes_nobodys_key_away(tmp_path, monkeypatch):
    """As `scp` writes it, a part that ends with a line among its states."""
    file, whole = tmp_path / "keys", "".join(f"{name} {digest}\n" for name, digest in KEYS.items())
    file.write_text(whole)
    keys, states = load_keys(str(file)), [whole[: whole.index("bob")], whole, whole]
    seen: list[dict[str, str]] = []

    def read(named: str) -> dict[str, str]:
        seen.append(dict(keys))
        file.write_text(states.pop(0) if states else whole)
        return load_keys(named)

    async def look() -> None:
        task = asyncio.create_task(keep_keys(keys, str(file), 0.001))
        while len(seen) < 6:
            await asyncio.sleep(0.001)
        task.cancel()

    monkeypatch.setattr("serve.auth.load_keys", read)
    monkeypatch.setattr("serve.auth.SETTLED_S", 0.001)
    asyncio.run(look())
    assert seen == [KEYS] * len(seen)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Bearer secret-a", "ann"),
        ("bearer secret-b", "bob"),
        ("Bearer secret-c", None),
        (f"Bearer {KEYS['ann']}", None),
        ("Bearer ", None),
        ("secret-a", None),
        ("Basic secret-a", None),
        ("Bearer \udcff\u20ac", None),
        ("", None),
        (None, None),
    ],
)
def test_a_token_has_an_owner_or_not(header, name):
    assert owner(KEYS, header) == name
    assert owner({}, header) == ANYONE


def test_hashes_are_compared_in_constant_time_and_all_of_them(monkeypatch):
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert owner(KEYS, "Bearer secret-a") == "ann"
    assert compared == [(KEYS["ann"], KEYS["ann"]), (KEYS["ann"], KEYS["bob"])]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_of_this_machine_alone_needs_no_keys(host):
    assert is_loopback(host)
    refuse_open_server(host, {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
def test_a_server_that_others_reach_needs_keys(host):
    with pytest.raises(ValueError, match="anyone could use it: name keys in api_keys_file"):
        refuse_open_server(host, {})
    refuse_open_server(host, KEYS)
