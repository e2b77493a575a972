"""A run's config from the command line: `--config FILE` and dotted overrides."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipelines.folders import flat
from yan_core.config import DatasetConfig, RunConfig, UnknownName, from_dict, to_dict, unknown_name

MAKES_A_RUN = ("prepare", "train", "run", "submit")
"""Commands that write into the folder of a run, and so do not start by its name's default alone."""


class UsageError(ValueError):
    """The command line cannot be understood."""


def config_parser(command: str) -> Any:
    """A jsonargparse parser of `RunConfig`: `--config FILE` and dotted overrides, help from the docstrings."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(message) from ex

    parser = Parser(prog=f"yan {command}", exit_on_error=True, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with what differs from the defaults")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse_config(command: str, args: Sequence[str]) -> RunConfig:
    """A run's config from `--config FILE` and dotted overrides.

    Raises:
        UsageError: On a missing or empty file, an unknown key (the nearest is offered) or a wrong value, or where
            neither a file nor a name says which run is meant.
    """
    for place, arg in enumerate(args):
        path = arg.removeprefix("--config=") if arg.startswith("--config=") else None
        path = args[place + 1] if arg == "--config" and place + 1 < len(args) else path
        if path is not None:
            _check_yaml(path)
    parser = config_parser(command)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jsonargparse announces its own future changes
        try:
            values = parser.parse_args(list(args)).as_dict()
        except UsageError as error:
            raise UsageError(_in_our_words(str(error))) from error
    values.pop("config", None)
    if command in MAKES_A_RUN and not any(arg.split("=")[0] in ("--config", "--name") for arg in args):
        raise UsageError(f"which run? --config FILE says it (shipped: {_shipped()}), or --name NAME with the defaults")
    return from_dict(RunConfig, _plain(values))


def _shipped() -> str:
    found = sorted(str(path) for path in Path(__file__).parent.joinpath("configs").glob("*.yaml"))
    return ", ".join(map(os.path.relpath, found))


def _check_yaml(path: str) -> None:
    """Say which file cannot be read, and where; jsonargparse tells the place in an unnamed text."""
    import yaml

    if Path(path).is_dir():
        raise UsageError(f"--config {path} is a folder: name a YAML file, such as {path.rstrip('/')}/config.yaml")
    if not Path(path).is_file():
        raise UsageError(f"--config: no file {path!r}. Shipped configs: {_shipped()}")
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} must be YAML: {error}") from error
    if not isinstance(found, dict):
        got = "nothing" if found is None else f"a {type(found).__name__}: {str(found)[:60]!r}"
        raise UsageError(f"--config {path} must hold settings by their keys, such as `name: mine`, got {got}")
    try:
        from_dict(RunConfig, found)
    except UnknownName as error:  # jsonargparse lets one pass where its value is an empty section
        raise UsageError(f"--config {path}: {error}") from error
    except ValueError:
        pass  # an override may give another value


def _plain(value: Any) -> Any:
    """jsonargparse's namespaces as dictionaries."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _in_our_words(message: str) -> str:
    """jsonargparse's message, of a wrong type in our words and of an unknown key with the nearest known one."""
    wrong = re.search(r'((?:Parser key "[\w.]+":\s+)+)Expected a (.+)\. Got value: (.*)', message)
    if wrong:
        kind = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", re.sub(r"<class '(\w+)'>", r"of type \1", wrong[2]))
        key = ".*.".join(re.findall(r'"([\w.]+)"', wrong[1]))  # of a data set its settings, not which one it is
        return f"{key}: must be {kind}, got {wrong[3]}"
    any_of = re.search(r'Parser key "([\w.]+)":[\s\S]*Subtypes: \[(.*)\][\s\S]*Given value: (.*)', message)
    if any_of:
        kinds = re.sub(r"<class '(\w+)'>", r"\1", any_of[2])
        return f"{any_of[1]}: must be one of {kinds}, got {any_of[3]}"
    of_a_data_set = re.search(r'Parser key "data\.datasets":\s+Option \'(\w+)\' is not accepted', message)
    if of_a_data_set:  # which one jsonargparse does not tell
        names = sorted(field.name for field in dataclasses.fields(DatasetConfig))
        return unknown_name(f"data.datasets.*.{of_a_data_set[1]}", of_a_data_set[1], names)
    known = list(flat(to_dict(RunConfig())))
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if in_group:
        names = [f"{in_group[1]}.{in_group[2]}"]
    else:
        words = [w.strip("'\",.:") for w in message.replace("=", " ").split()]
        names = [w.removeprefix("--") for w in words] if re.search("unrecognized|not accept", message) else []
    for name in names:
        if name and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
                k for k in known if difflib.get_close_matches(name.split(".")[-1], [k.split(".")[-1]], n=1, cutoff=0.75)
            ]
            if near:
                return f"{message.strip()}\nDid you mean {near[0]}?"
    return message.strip()
