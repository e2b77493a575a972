"""The `yan` command: a table of subcommands, each loaded when it is chosen."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pipelines.arguments import UsageError, parse_config
from yan_core.config import NUM_STEPS, Method, Ranking, SamplingConfig, to_dict
from yan_core.files import code_description, write_file

# --- commands ---------------------------------------------------------------------------------------------------------


def _prepare(args: list[str]) -> int:
    config = parse_config("prepare", args)
    from pipelines.cluster import ray_session
    from pipelines.folders import run_lock
    from pipelines.run import prepare_step

    folder = Path(config.runs_dir) / config.name
    with run_lock(folder), ray_session(config.scaling.max_workers, config.scaling.cpus_per_worker):
        prepare_step(config, folder)
    return 0


def _train(args: list[str]) -> int:
    config = parse_config("train", args)
    from pipelines.run import run

    result = run(config, publish=False)
    print(f"model: {result.model}  MLflow run: {result.run_id}")
    return 0


def _run(args: list[str]) -> int:
    config = parse_config("run", args)
    from pipelines.folders import where_to_look
    from pipelines.run import run

    result = run(config)
    print(f"model: {result.model}  registered: {result.registered}  MLflow run: {result.run_id}")
    print(f"serve it: yan serve --model {result.model}")
    print(f"look at it: {where_to_look(result.tracking_uri, result.run_id)}")
    return 0


def _at_least_one(chosen: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(chosen, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be >= 1, got {value}")


def _add_sampling(parser: argparse.ArgumentParser, default: str) -> None:
    """Options of how answers are drawn."""
    parser.add_argument("--method", choices=get_args(Method), default=None, help=f"ODE solver; default: {default}")
    parser.add_argument("--guidance-scale", type=float, default=None, help="classifier-free guidance, 1 is none")
    parser.add_argument("--num-candidates", type=int, default=None, help="answers drawn for each row; the best is used")
    parser.add_argument("--ranking", choices=get_args(Ranking), default=None, help="what makes a candidate the best")


def _sampling(chosen: argparse.Namespace, default: SamplingConfig) -> SamplingConfig:
    """The options of `_add_sampling`, and the default of those that are not given."""
    named = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(SamplingConfig)}
    return dataclasses.replace(default, **{name: value for name, value in named.items() if value is not None})


def _evaluate(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="yan evaluate", description="Quality of a saved model on a file of rows.")
    parser.add_argument("--model", required=True, help="model folder, such as runs/world/model")
    parser.add_argument("--config", required=True, help="YAML whose data set gives columns, row filter and template")
    parser.add_argument("--data", required=True, help="file with the data set's columns")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="solver steps; one pass each with Euler")
    parser.add_argument("--max-rows", type=int, default=None, help="most rows to score, the first ones")
    _add_sampling(parser, "the config's")
    parser.add_argument("--bertscore-model", help="folder of an encoder: BERTScore too; default: the config's")
    parser.add_argument("--perplexity-model", help="folder of a causal model: perplexity too; default: the config's")
    parser.add_argument(
        "--diversity", type=int, metavar="K", help="K answers a row: how they differ; default: the config's"
    )
    parser.add_argument("--use-gpu", action="store_true", help="on a GPU, in float32")
    parser.add_argument("--json", default=None, help="write the figures to this file")
    chosen = parser.parse_args(args)
    _at_least_one(chosen, "num_steps", "max_rows", "num_candidates")
    config = parse_config("evaluate", ["--config", chosen.config])
    from collections import Counter

    from pipelines.evaluation import check_models, evaluate_model, summary
    from pipelines.plain import device_of
    from pipelines.prepare import read_text_rows
    from yan_core.checkpoint import read_config

    read_config(chosen.model)
    counts: Counter[str] = Counter()
    rows = read_text_rows(config, chosen.data, counts)[: chosen.max_rows]
    sampling = _sampling(chosen, config.evaluation.sampling)
    given = {name: getattr(chosen, name) for name in ("diversity", "bertscore_model", "perplexity_model")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        how = dataclasses.replace(config.evaluation, num_steps=(chosen.num_steps,), sampling=sampling, **given)
        check_models(how)
    except ValueError as error:
        raise UsageError(str(error)) from error
    (quality,) = evaluate_model(Path(chosen.model), rows, how, str(device_of(chosen.use_gpu)))
    result = summary(quality, len(rows), Path(chosen.model), chosen.data, counts)
    print(json.dumps(result, indent=2))
    if chosen.json:
        write_file(Path(chosen.json), json.dumps(result, indent=2))
    return 0


def _generate(args: list[str]) -> int:
    from pipelines.answer import Settings

    about = "Answer every row of files into Parquet shards, in order; an interrupted call goes on where it stopped."
    parser = argparse.ArgumentParser(prog="yan generate", description=about)
    parser.add_argument("--model", required=True, help="model folder or models:/name@alias")
    parser.add_argument("--input", required=True, nargs="+", help="files, folders or globs: Parquet, JSONL, CSV, text")
    parser.add_argument("--output", required=True, help="folder of the answers, seen by every node")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="fields of the model's task (docs/TASKS.md) whose columns have other names, as `columns` of a data set",
    )
    parser.add_argument("--num-steps", type=int, default=Settings.num_steps, help="solver steps")
    _add_sampling(parser, "euler")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of all rows; each draws from its own place")
    parser.add_argument("--rows-per-shard", type=int, default=Settings.rows_per_shard, help="rows of an output file")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that a worker answers at once")
    parser.add_argument("--num-workers", type=int, default=None, help="default: one for each core, or GPU")
    parser.add_argument("--use-gpu", action="store_true", help="one GPU a worker, in bfloat16")
    parser.add_argument("--fresh", action="store_true", help="drop the answers that are in the output folder")
    parser.add_argument("--tracking-uri", default="", help="MLflow store for models:/ names")
    chosen = parser.parse_args(args)
    _at_least_one(chosen, "num_steps", "rows_per_shard", "batch_size", "num_workers", "num_candidates")
    if "://" in chosen.output:
        raise UsageError(f"--output must be a folder that every node sees, got the URL {chosen.output}")
    pairs = [pair.partition("=") for pair in chosen.columns]
    if not all(field and column for field, _, column in pairs):
        raise UsageError(f"--columns must be FIELD=COLUMN ..., got {' '.join(chosen.columns)}")
    settings = Settings(
        num_steps=chosen.num_steps,
        sampling=_sampling(chosen, SamplingConfig()),
        seed=chosen.seed,
        columns={field: column for field, _, column in pairs},
        rows_per_shard=chosen.rows_per_shard,
        use_gpu=chosen.use_gpu,
    )
    import importlib

    # Named as a string: pipelines never imports serve but here.
    registry = importlib.import_module("serve.registry")
    from pipelines.generate import generate

    with registry.resolve(chosen.model, chosen.tracking_uri or _default_registry()) as found:
        manifest = generate(
            found.folder,
            chosen.input,
            Path(chosen.output),
            settings,
            batch_size=chosen.batch_size,
            num_workers=chosen.num_workers,
            fresh=chosen.fresh,
            say=lambda line: print(line, flush=True),
        )
    cut = f", {manifest['sources_cut']} read in part, being too long" * bool(manifest["sources_cut"])
    print(f"{manifest['rows']} rows in {chosen.output}, {manifest['failed']} failed{cut}", flush=True)
    if manifest["first_failed"]:
        first = manifest["first_failed"]
        print(f"the first that failed, row {first['row_number'] + 1} of {first['file']}: {first['error']}", flush=True)
    return 0


def _serve(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="yan serve", description="Serve a model over HTTP until interrupted.")
    parser.add_argument("--model", required=True, help="model folder or models:/name@alias")
    unnamed: Any = {"default": argparse.SUPPRESS}  # the defaults are in serve.schemas.AppArgs and serve.launch
    parser.add_argument("--host", **unnamed, help="address to listen on")
    parser.add_argument("--port", type=int, **unnamed, help="port to listen on")
    parser.add_argument("--num-replicas", type=int, **unnamed, help="copies of the model")
    parser.add_argument("--num-steps", type=int, **unnamed, help="solver steps where a request names none")
    parser.add_argument("--use-gpu", action="store_true", **unnamed, help="one GPU a replica")
    parser.add_argument(
        "--address", default=None, help="Ray cluster to serve on; default: RAY_ADDRESS, else a local one"
    )
    parser.add_argument("--tracking-uri", default="", help="MLflow store for models:/ names")
    more = parser.add_argument_group("more", argument_default=argparse.SUPPRESS)
    more.add_argument("--api-keys-file", metavar="FILE", help="who may ask: see docs/SERVING.md")
    more.add_argument("--requests-per-minute", type=int, help="most requests of a key to a replica")
    more.add_argument("--access-log", metavar="FILE", help="one JSON line a request; default: with Ray's logs")
    more.add_argument("--log-prompts", action="store_true", help="the access log holds what was asked")
    more.add_argument("--deterministic", action="store_true", help="the same text to the last bit in any company")
    more.add_argument(
        "--max-replicas", type=int, help="most copies, as many as the requests need; --num-replicas: the fewest"
    )
    more.add_argument("--max-batch-size", type=int, help="most sources of a batch")
    more.add_argument("--max-queued-requests", type=int, help="most sources that wait in a replica; then status 503")
    more.add_argument("--more-models", nargs="+", metavar="MODEL", help="other models, as --model names them")
    more.add_argument("--any-registered", action="store_true", help="requests may name any model of the registry")
    more.add_argument("--max-models", type=int, help="most models in a replica's memory")
    chosen = parser.parse_args(args)
    _at_least_one(chosen, "num_steps", "port")
    given = vars(chosen)
    ray_address = given.pop("address")
    where = {key: given.pop(key) for key in ("host", "port") if key in given}
    given["tracking_uri"] = given["tracking_uri"] or _default_registry()
    import importlib

    # Named as strings: pipelines never imports serve but here.
    launch, schemas = importlib.import_module("serve.launch"), importlib.import_module("serve.schemas")
    try:
        app_args = schemas.AppArgs(**given)
    except ValueError as error:
        raise UsageError(_by_option(error, schemas.AppArgs.model_fields)) from error
    launch.serve_blocking(app_args, **where, ray_address=ray_address)
    return 0


def _by_option(error: Any, fields: Iterable[str]) -> str:
    """The first of pydantic's errors about the app's arguments, with the options' names for the fields'."""
    first = error.errors(include_url=False)[0]
    said = re.sub("^Value error, ", "", first["msg"]).replace("Input should be", "must be")
    said = f"{first['loc'][0]} {said}, got {first['input']!r}" if first["loc"] else said
    for field in fields:
        if "_" in field or field in first["loc"]:
            said = re.sub(rf"\b{field}\b", f"--{field.replace('_', '-')}", said)
    return said


def _default_registry() -> str:
    """The store that `yan run` makes where nothing else is named."""
    from pipelines.folders import store_here

    return "" if os.environ.get("MLFLOW_TRACKING_URI") else store_here()


def _config(args: list[str]) -> int:
    import yaml

    print(yaml.safe_dump(to_dict(parse_config("config", args)), sort_keys=False), end="")
    return 0


def _quickstart(args: list[str]) -> int:
    from pipelines.quickstart import main as quickstart

    return quickstart(args)


def _demo(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="yan demo", usage="yan demo NAME [options]; see yan demo NAME --help")
    parser.add_argument("NAME", choices=["geometry"], help="geometry: what experts are for, on points in the plane")
    parser.parse_args(args[:1])
    from pipelines.geometry.demo import main as geometry

    return geometry(args[1:])


def _tune(args: list[str]) -> int:
    from pipelines.tune import main as tune

    return tune(args)


def _compare(args: list[str]) -> int:
    from pipelines.compare import main as compare

    return compare(args)


def _lm_eval(args: list[str]) -> int:
    from pipelines.harness import main as harness

    return harness(args)


def _plan(args: list[str]) -> int:
    from pipelines.plan import main as plan

    return plan(args)


def _submit(args: list[str]) -> int:
    from pipelines.jobs import submit_main

    return submit_main(args)


def _jobs(args: list[str]) -> int:
    from pipelines.jobs import jobs_main

    return jobs_main(args)


def _stop(args: list[str]) -> int:
    from pipelines.jobs import stop_main

    return stop_main(args)


def _status(args: list[str]) -> int:
    from pipelines.status import main as status

    return status(args)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "run": ("prepare, train, evaluate and register, going on where an earlier call stopped", _run),
    "prepare": ("read, tokenise and write the data of a run", _prepare),
    "train": ("prepare and train; `run` evaluates and registers too", _train),
    "evaluate": ("score a saved model on a file", _evaluate),
    "generate": ("answer every row of files, in order", _generate),
    "compare": ("train YAN and its baselines on the same data for the same compute; one table of all", _compare),
    "lm-eval": ("lm-evaluation-harness with a saved model: `--model yan --model_args pretrained=FOLDER`", _lm_eval),
    "serve": ("serve a model over HTTP", _serve),
    "submit": ("run on a cluster what `run` would here, and follow it", _submit),
    "jobs": ("the jobs of a cluster", _jobs),
    "status": ("a cluster's nodes, jobs, services and the latest runs, in one screen", _status),
    "stop": ("have a job of a cluster save a checkpoint and end", _stop),
    "tune": ("search settings with Ray Tune; each trial is a run in MLflow", _tune),
    "plan": ("time, cost, bottleneck and checkpoint interval of a training on a cluster", _plan),
    "config": ("print the resolved config", _config),
    "demo": ("small experiments that show one idea: `yan demo geometry`", _demo),
    "quickstart": ("the main job end to end on the built-in world", _quickstart),
}
"""Subcommand -> what it does, and the function that does it."""


def _usage() -> str:
    lines = [f"  {name:<11} {what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: yan <command> [--config FILE] [--section.key value ...]",
            "",
            *lines,
            "",
            "yan <command> --help for more, yan --version for which copy of the code this is",
        ]
    )


def _said(error: Exception) -> str:
    """A message without Python's numbers, and with what to do where the disk is full."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for {error.filename or 'a file'}: free some, then give the same command again"
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. A mistake of the user's ends in one message, not in a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"yan {code_description()}")
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        print(
            f"yan: unknown command {args[0]!r}{f'; did you mean {near[0]}?' if near else ''}\n\n{_usage()}",
            file=sys.stderr,
        )
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` blocks stop what we started
    try:
        return COMMANDS[args[0]][1](args[1:])
    except KeyboardInterrupt:
        print("\nyan: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except ImportError as error:
        extra = {"serve": "serve", "lm-eval": "harness"}.get(args[0], "pipelines")
        if os.environ.get("YAN_TRACEBACK") or (error.name or "").split(".")[0] in ("yan_core", "pipelines", "serve"):
            raise
        remedy = f"; in the folder of YAN's pyproject.toml: pip install -e '.[{extra}]'"
        print(f"yan {args[0]}: {error}{'' if 'pip install' in str(error) else remedy}", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        ours = type(error).__module__.split(".")[0] in ("yan_core", "pipelines", "serve")
        if os.environ.get("YAN_TRACEBACK") or (isinstance(error, RuntimeError) and not ours):
            raise
        print(f"yan {args[0]}: {_said(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
