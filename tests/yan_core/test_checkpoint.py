"""Model folders: bit-exact, verified, and never half there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.yan_core.tiny import randomize, tiny_config
from yan_core import checkpoint
from yan_core.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    atomic_folder,
    from_pretrained,
    load,
    read_config,
    save_pretrained,
    sha256_file,
)
from yan_core.config import TokenizerConfig
from yan_core.files import write_file
from yan_core.generator import TextGenerator
from yan_core.model import YanModel, build_model
from yan_core.tokenization import Tokenizer

TOKENIZER = Tokenizer.train(["Mary went to the kitchen. Where is the apple?"], TokenizerConfig(kind="word"))
DETAILS = {"task": "question_answering", "max_source_tokens": 12, "max_target_tokens": 4, "commit": "abc"}
FILES = ("config.json", "model.safetensors", "tokenizer.json")
BESIDE = ("README.md", "tokenizer_config.json")
"""For people and other libraries: never read here."""


def fresh_model(seed: int = 0, **changes: Any) -> YanModel:
    return randomize(build_model(tiny_config(**changes), TOKENIZER.vocab_size, seed), seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model", fresh_model(), TOKENIZER, DETAILS)
    return tmp_path / "model"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_round_trip_is_bit_exact(folder: Path) -> None:
    model, tokenizer, details = from_pretrained(folder)
    saved = fresh_model().state_dict()
    assert model.state_dict().keys() == saved.keys()
    for name, value in model.state_dict().items():
        assert value.dtype == saved[name].dtype and torch.equal(value, saved[name]), name
    assert model.config == tiny_config() and model.vocab_size == TOKENIZER.vocab_size
    assert tokenizer.to_json() == TOKENIZER.to_json() and details == DETAILS
    assert not model.training


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": "mamba"},
        {"latent_dim": 6, "length": "predicted"},
        {"prediction": "endpoint", "self_conditioning": True},
    ],
)
def test_every_architecture_survives(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = fresh_model(**changes)
    save_pretrained(tmp_path / "model", model, TOKENIZER, DETAILS)
    again = from_pretrained(tmp_path / "model")[0]
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = fresh_model().to(dtype)
    save_pretrained(tmp_path / "model", model, TOKENIZER, DETAILS)
    again = from_pretrained(tmp_path / "model")[0]
    for name, value in again.state_dict().items():
        assert value.dtype == dtype and torch.equal(value, model.state_dict()[name])


def test_special_values_survive(tmp_path: Path) -> None:
    model = fresh_model()
    with torch.no_grad():
        model.decoder.head.bias[:4] = torch.tensor([-0.0, 1e-45, float("inf"), float("nan")])
    save_pretrained(tmp_path / "model", model, TOKENIZER, DETAILS)
    bits = from_pretrained(tmp_path / "model")[0].decoder.head.bias.view(torch.int32)
    assert torch.equal(bits, model.decoder.head.bias.view(torch.int32))


def test_a_loaded_model_can_be_trained_on(folder: Path) -> None:
    assert all(parameter.requires_grad for parameter in from_pretrained(folder)[0].parameters())


def test_load_gives_a_generator_that_answers_as_the_model_saved(folder: Path) -> None:
    sources, seeds = ["Where is the apple?"] * 8, list(range(8))
    saved = TextGenerator(fresh_model(), TOKENIZER, DETAILS).generate(sources, seeds=seeds)
    assert [g.tokens for g in load(folder).generate(sources, seeds=seeds)] == [g.tokens for g in saved]


def test_the_folder_holds_its_files_and_their_record(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == sorted((*FILES, *BESIDE))
    config = read_config(folder)
    assert config["format_version"] == FORMAT_VERSION and config["commit"] and config["yan_version"]
    assert config["sha256"] == {name: sha256_file(folder / name) for name in FILES[1:]}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_never_read_may_be_damaged_or_gone(folder: Path, name: str) -> None:
    answer = load(folder).generate(["Where is the apple?"])[0].tokens
    (folder / name).write_bytes(b"\xff---")
    assert load(folder).generate(["Where is the apple?"])[0].tokens == answer
    (folder / name).unlink()
    assert load(folder).generate(["Where is the apple?"])[0].tokens == answer


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(folder: Path, name: str, share: float) -> None:
    file = folder / name
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load(folder)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_flipped_bit_is_noticed(folder: Path, name: str, place: float) -> None:
    content = bytearray((folder / name).read_bytes())
    content[int(len(content) * place) if place >= 0 else -1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: its SHA-256"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda c: c.update(format_version=FORMAT_VERSION + 1),
            rf"config\.json has format_version {FORMAT_VERSION + 1}",
        ),
        (lambda c: c.pop("format_version"), r"config\.json has format_version None"),
        (lambda c: c.pop("sha256"), r"config\.json is damaged: it lacks sha256"),
        (lambda c: c.pop("details"), r"config\.json is damaged: it lacks details"),
        (
            lambda c: c.update(details={"task": "question_answering"}),
            r"config\.json is damaged: it lacks details\.max_source_tokens, details\.max_target_tokens",
        ),
        (lambda c: (c.pop("model"), c.pop("vocab_size")), r"config\.json is damaged: it lacks model, vocab_size"),
        (lambda c: c["sha256"].pop("tokenizer.json"), r"tokenizer\.json is damaged: its SHA-256"),
        (lambda c: c["model"].update(d_model=32), r"model\.safetensors does not fit its config\.json"),
        (lambda c: c["model"].update(flow_blocks=3), r"model\.safetensors does not fit its config\.json"),
        (lambda c: c["model"].update(flow_blocks=1), r"model\.safetensors does not fit its config\.json"),
        (lambda c: c.update(vocab_size=c["vocab_size"] + 1), r"model\.safetensors does not fit its config\.json"),
        (lambda c: c["model"].update(depth=3), r"config\.json describes no model .*model\.depth: unknown name"),
        (lambda c: c["model"].update(num_experts=0), r"config\.json describes no model .*model\.num_experts must be"),
    ],
)
def test_an_edited_config_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], pattern: str) -> None:
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=pattern):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format_version": "1"}', "\xff\xfe"])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(folder)


def test_a_folder_that_is_not_there_says_where_models_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is not a YAN model: .*runs/<name>/model"):
        load(tmp_path / "nowhere")


def test_saving_replaces_the_folder(folder: Path) -> None:
    (folder / "stray.txt").write_text("old")
    save_pretrained(folder, fresh_model(1), TOKENIZER, {**DETAILS, "commit": "new"})
    model, _, details = from_pretrained(folder)
    assert details["commit"] == "new"
    assert torch.equal(model.decoder.head.weight, fresh_model(1).decoder.head.weight)
    assert sorted(path.name for path in folder.iterdir()) == sorted((*FILES, *BESIDE))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", ["save_file", "sha256_file", "code_commit"])
def test_a_failure_while_saving_leaves_the_old_folder_and_no_scratch(
    folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (folder / name).read_bytes() for name in FILES}

    def stop(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, fails, stop)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(folder, fresh_model(1), TOKENIZER, DETAILS)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(folder.parent / "other", fresh_model(1), TOKENIZER, DETAILS)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_details_that_are_no_json_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_pretrained(tmp_path / "model", fresh_model(), TOKENIZER, {"task": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "model") as scratch:
        (scratch / "a").write_text("x")
        assert not (tmp_path / "deep" / "model").exists()
    assert (tmp_path / "deep" / "model" / "a").read_text() == "x"


def test_what_a_killed_process_of_the_same_id_left_is_no_obstacle(folder: Path) -> None:
    for kind in ("part", "old"):
        left = folder.parent / f".model.{os.getpid()}.{kind}"
        left.mkdir()
        (left / "model.safetensors").write_text("half")
    save_pretrained(folder, fresh_model(1), TOKENIZER, DETAILS)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert torch.equal(from_pretrained(folder)[0].decoder.head.weight, fresh_model(1).decoder.head.weight)


def test_a_model_loaded_in_bfloat16_answers(folder: Path) -> None:
    generator = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in generator.model.parameters()} == {torch.bfloat16}
    exact = load(folder).generate(["Where is the apple?"] * 32, seeds=list(range(32)))
    rough = generator.generate(["Where is the apple?"] * 32, seeds=list(range(32)))
    same = sum(a.tokens == b.tokens for a, b in zip(exact, rough, strict=True))
    assert same > 16  # random weights: near ties are common


def test_what_is_there_and_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    """As root, a rename would put a file in the place of `/dev/stdout`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, "text")
    assert pipe.is_fifo() and os.read(reader, 10) == b"text"
    os.close(reader)
