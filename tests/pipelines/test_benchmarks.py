"""The speed benchmark of the sampler: a naive sampler of the same tokens, sizes as they are called, one report."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.benchmarks import decoders, machine, ray_overhead, train_step
from pipelines.benchmarks import sampler as benchmark
from tests.yan_core.tiny import CONFIG, VOCAB, random_rows, tiny_model
from yan_core.batching import pad_rows
from yan_core.sampler import sample

SOURCES = pad_rows(random_rows([7, 1, 12, 4, 9, 2]), 0)
SEEDS = torch.tensor([0, 1, 2, 3, 2**40, 5])
CPU = torch.device("cpu")
LIMITS = benchmark.Limits(bytes_per_s=1e10, flops_per_s=1e11, budget_s=0.05, limit_s=60, most=3)
CELL = decoders.Cell(size="tiny", model=CONFIG, vocab_size=VOCAB, batch=3, length=6, source_length=5)


@pytest.mark.property
@pytest.mark.parametrize("scope", ["token", "segment", "sequence"])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_naive_gives_the_tokens_and_experts_of_the_sampler(scope, num_steps, seed):
    model = tiny_model(seed, expert_scope=scope, cross_attention_every=1 + seed % 2, init_noise=0.5 + seed / 2)
    for length in (10 - seed, 1):
        ids, expert = decoders.naive(model, *SOURCES, length, SEEDS, num_steps)
        drawn = sample(model, *SOURCES, length, SEEDS, num_steps)
        assert torch.equal(ids, drawn.ids)
        assert torch.equal(expert, drawn.expert)


def test_naive_saves_nothing():
    model, calls = tiny_model(), {"trunk": 0, "encoder": 0, "heads": 0, "projections": 0}
    assert model.source_encoder is not None
    for name, module in (("trunk", model.flow.norm), ("encoder", model.source_encoder), ("heads", model.flow.experts)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    for block in model.flow.blocks:
        block.cross_attention.key_value.register_forward_hook(
            lambda *_: calls.update(projections=calls["projections"] + 1)
        )
    decoders.naive(model, *SOURCES, 10, SEEDS, num_steps=3)
    assert calls == {"trunk": 4, "encoder": 1, "heads": 4, "projections": 4 * 2}


@pytest.mark.parametrize("size, expected", [("5m", 5e6), ("50m", 50e6), ("200m", 200e6)])
def test_sizes_are_what_they_are_called(size, expected):
    config = decoders.size_config(size)
    assert config.name == f"size_{size}"
    assert config.model.num_experts == 8
    assert config.tokenizer.vocab_size == (8_192 if size == "5m" else 32_768)
    own = decoders.parameters_of(config.model, config.tokenizer.vocab_size)
    assert abs(own / expected - 1) < 0.05
    assert abs(decoders.BaselineConfig.of_size(own).num_parameters / own - 1) < 0.05


def test_the_floor_counts_what_the_sampler_multiplies():
    """Against PyTorch's own count of a run: the floor leaves out what depends on times alone, and little else."""
    cell = replace(CELL, model=replace(CONFIG, d_model=64, flow_blocks=4), batch=8, length=32, source_length=20)
    for name in ("ours", "naive"):
        call = decoders.contestant(name, cell)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # it counts no fused attention
            call()
        assert 0.9 < decoders.work(name, cell)[1] / counted.get_total_flops() <= 1.0


@pytest.mark.parametrize("name", ["naive", "ours", "AR", "MDM"])
def test_a_contestant_fills_every_row(name):
    if name == "AR":
        pytest.importorskip("transformers", reason="the extra `baselines` is not installed")
    call = decoders.contestant(name, CELL)
    ids = call()
    assert ids.shape == (3, 6)
    assert torch.equal(call(), ids)
    assert decoders.contestant("MDM", CELL, passes=2)().eq(3).sum() == 3 * 4


@pytest.mark.parametrize("eager, compiled", [("AR", "AR compiled"), ("MDM", "MDM compiled"), ("ours", "ours compiled")])
def test_compiled_contestants_give_the_tokens_of_the_plain_ones(eager, compiled, monkeypatch):
    """Without the compiler, which takes a minute: what is wrapped around it."""
    if eager == "AR":
        pytest.importorskip("transformers", reason="the extra `baselines` is not installed")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    call = decoders.contestant(compiled, CELL)
    assert torch.equal(call(), decoders.contestant(eager, CELL)())
    assert torch.equal(call(), call())


def test_a_contestant_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    real = decoders.contestant

    def contestant(name, cell, passes=None):
        if name == "ours compiled":
            raise RuntimeError("no compiler\nmore")
        return real(name, cell, passes)

    monkeypatch.setattr(benchmark, "contestant", contestant)
    limits = replace(LIMITS, memory=False)
    rows = benchmark.measure(CELL, ("naive", "ours", "ours compiled"), limits, lambda _: None)
    assert [row["contestant"] for row in rows] == ["naive", "ours", "ours compiled"]
    assert rows[2]["failed"] == "RuntimeError: no compiler"
    assert "RuntimeError: no compiler" in benchmark.table(rows).splitlines()[3]
    assert rows[1]["same_tokens_share"] == 1
    assert rows[1]["speedup_over_naive"] == rows[0]["median_ms"] / rows[1]["median_ms"]


def test_what_would_take_too_long_is_left_out_or_timed_in_part():
    rate = decoders.work("MDM", CELL)[1]  # one pass a second
    slow = replace(LIMITS, flops_per_s=rate, limit_s=1.05, memory=False)
    assert decoders.work("naive", CELL)[1] > 1.05 * rate
    rows = {r["contestant"]: r for r in benchmark.measure(CELL, ("naive", "MDM"), slow, lambda _: None)}
    assert rows["naive"]["failed"].startswith("left out: ")
    assert rows["MDM"]["timed_passes"] < CELL.length
    assert rows["MDM"]["tokens_per_s"] == pytest.approx(1000 * 3 * 6 / rows["MDM"]["median_ms"])
    assert f"from {rows['MDM']['timed_passes']} of 6 passes" in benchmark.table(list(rows.values()))


def test_turns_are_taken_in_turn_and_slow_calls_get_fewer():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times, failed = machine.take_turns(calls, {"a": 0.1, "b": 0.1, "c": 0.5}, CPU, budget_s=1.0, most=8)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 8, "b": 8, "c": 3}
    assert [name for name in order if name != "c"] == ["a", "b"] * 8
    assert failed == {}
    assert machine.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def held(megabytes: int) -> int | None:
    """In a child: peak memory of a call that holds so much."""
    torch.ones(40_000_000)  # freed again: not this call's
    return machine.peak_bytes(lambda: torch.ones(megabytes * 250_000).sum(), CPU)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_the_calls_own():
    peak = machine.in_child(held, 64)
    assert peak is not None and 60e6 < peak < 80e6


def test_bars_are_read_off_the_rows_they_are_about():
    def row(size, batch, contestant, ms):
        return {"size": size, "batch": batch, "length": 128, "contestant": contestant, "median_ms": ms}

    rows = [row("5m", 1, "naive", 32.0), row("5m", 1, "ours", 20.0), row("5m", 64, "naive", 17.0)]
    rows += [row("5m", 64, "ours", 10.0), row("200m", 1, "ours graph", 1.5), row("200m", 1, "AR compiled", 60.0)]
    assert [(b["value"], b["met"]) for b in benchmark.bars(rows, "cpu")] == [(1.6, True), (1.7, False)]
    assert [(b["value"], b["met"]) for b in benchmark.bars(rows, "cuda")] == [(1.5, True), (40.0, False)]


def test_the_bar_preset_writes_its_report(tmp_path):
    """In a fresh interpreter, as it is run; the models are tiny."""
    out, results = tmp_path / "bar.json", tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "pipelines.benchmarks.sampler",
        "--preset",
        "bar",
        "--tiny",
        "--source-length",
        "5",
    ]
    results.mkdir()
    (results / "sampler.jsonl").write_text("{}\n")
    command += ["--json", str(out), "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [entry["batch"] for entry in report["speedup_over_naive"]] == [1, 64]
    for entry in report["speedup_over_naive"]:
        assert entry["ratio"] > 0
        assert entry["same_tokens"] is True
        assert entry["peak_memory_ratio"] is None or entry["peak_memory_ratio"] >= 0
    assert {"date", "machine", "precision", "wall_s", "bars"} <= report.keys()
    lines = [json.loads(line) for line in (results / "sampler.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[1] == report

    printed = done.stdout.splitlines()
    start = next(i for i, line in enumerate(printed) if line.startswith("size "))
    for line, row in zip(printed[start + 1 :], report["rows"], strict=False):
        cells = line.split()
        assert cells[:4] == [row["size"], str(row["batch"]), str(row["length"]), row["contestant"]]
        assert cells[4] == f"{row['median_ms']:.2f}"
        assert f"{row['speedup_over_naive']:.2f}x" in cells


def test_the_benchmark_needs_neither_ray_nor_mlflow_nor_transformers_to_start():
    code = "import sys, pipelines.benchmarks.sampler as s; s.parse(['--preset', 'bar']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'ray'", "'mlflow'", "'jsonargparse'", "'transformers'"} & set(done.stdout.strip("[]\n").split(", "))


def test_training_steps_of_every_mixture_are_timed_against_two_dense_experts(tmp_path):
    tiny = ["--d-model", "16", "--batch", "4", "--source", "6", "--target", "5", "--seconds", "1"]
    assert train_step.main([*tiny, "--json", str(tmp_path / "out.json")]) == 0
    rows = {row["mixture"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == list(train_step.MIXTURES)
    assert rows["K=2"]["ratio_to_k2"] == 1
    for row in rows.values():
        assert row["ratio_to_k2"] == pytest.approx(row["median_ms"] / rows["K=2"]["median_ms"]) and row["turns"] >= 1


def test_what_ray_adds_is_told_without_the_time_in_which_its_worker_was_stopped():
    # A step takes the worker 1.1 s; from 20 to 30 and from 41 to 51 it was stopped. The plain loop takes 1 s a step.
    told, at = [], 0.0
    for step in range(1, 41):
        at += 1.1
        at += 10 * sum(at - 1.1 < begin <= at for begin in (20.0, 41.0))
        told.append((step, at, 1100.0))
    found = ray_overhead.compare(
        told, [0.5] * 40, {step: float(step) for step in range(41)}, [(20.0, 30.0), (41.0, 51.0)]
    )
    assert found["steps"] == 29  # the first ten seconds are left out
    assert found["ray_ms"] == pytest.approx(1100)
    assert found["bare_ms"] == pytest.approx(1000)
    assert found["overhead"] == pytest.approx(0.1)
    assert found["data_wait_share"] == pytest.approx(0.5)
