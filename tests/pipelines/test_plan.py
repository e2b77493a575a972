"""The model of a training's cost: against counted operations, limits that are known, and a played training."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.cli import main
from pipelines.plan import (
    HARDWARE,
    Job,
    block_passes,
    checkpoint_interval,
    communicate_s,
    lost_share,
    make_plan,
    num_parameters,
    peak_flops,
    row_flops,
    shared_step_s,
    simulate,
)
from tests.yan_core.tiny import random_rows, tiny_config
from yan_core.batching import task_batch
from yan_core.checkpoint import save_pretrained
from yan_core.config import EncoderConfig, FlowLossConfig, ModelConfig, TokenizerConfig
from yan_core.loss import Objective
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer
from yan_core.training import freeze_all_but

DETAILS = {"task": "infilling", "max_source_tokens": 8, "max_target_tokens": 4}
MODEL = ModelConfig(d_model=64, num_heads=4, num_experts=4, flow_blocks=3, target_encoder=EncoderConfig(num_blocks=1))
JOB = Job(MODEL, 300, 40, 24, 64, 3.0, 1e9, 8)
H200 = HARDWARE["h200"]


@pytest.mark.parametrize(
    "change", [{}, {"num_experts": 8, "top_k": 2}, {"cross_attention_every": 2}, {"flow_blocks": 1}]
)
@pytest.mark.parametrize("num_steps", [1, 4])
def test_operations_are_those_that_pytorch_counts(change, num_steps):
    job = replace(JOB, model=replace(MODEL, **change), solver_steps=float(num_steps))
    model = build_model(job.model, job.vocab_size, 0)
    freeze_all_but(model, ("source_encoder", "flow"))
    rows, loss = 3, FlowLossConfig()
    sources, targets = random_rows([job.source_tokens] * rows), random_rows([job.target_tokens] * rows)
    batch = task_batch(sources, targets, torch.arange(rows), loss, job.target_tokens)
    with FlopCounterMode(display=False) as counter:
        total, _ = Objective(model, loss)(batch, num_steps)
        forward = counter.get_total_flops()
        total.backward()
    expected_forward, expected_backward = row_flops(job)
    assert forward / rows == pytest.approx(expected_forward, rel=0.06)
    assert (counter.get_total_flops() - forward) / rows == pytest.approx(expected_backward, rel=0.06)


def test_parameters_are_those_of_the_model():
    model = build_model(MODEL, 300, 0)
    everything, learning = num_parameters(JOB)
    assert everything == model.num_parameters()
    freeze_all_but(model, ("source_encoder", "flow"))
    assert learning == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_one_worker_waits_for_nobody_and_many_share_the_work():
    assert communicate_s(replace(JOB, num_workers=1), H200, 1e8, 1e8) == 0
    fast = replace(H200, node_bytes_per_s=1e30, network_bytes_per_s=1e30, latency_s=0.0, tokens_per_core_s=1e30)
    alone, eight = (make_plan(replace(JOB, num_workers=n), fast) for n in (1, 8))
    assert alone.step_s == pytest.approx(8 * eight.step_s) and alone.bottleneck == "computing"
    assert eight.steps == alone.steps == 1e9 / (64 * 24)


def test_the_bottleneck_is_named():
    assert make_plan(JOB, replace(H200, tokens_per_core_s=1.0)).bottleneck == "reading data"
    assert make_plan(JOB, replace(H200, node_bytes_per_s=1.0)).bottleneck == "the network"
    assert make_plan(JOB, replace(H200, flops_per_s=1e6)).bottleneck == "computing"


def test_sharding_needs_less_memory_and_moves_more():
    ddp, fsdp = (make_plan(replace(JOB, strategy=s), H200) for s in ("ddp", "fsdp"))
    assert fsdp.weights_bytes == pytest.approx(ddp.weights_bytes / 8)
    assert fsdp.communicate_s > ddp.communicate_s
    assert not make_plan(JOB, replace(H200, memory_bytes=1e6)).weights_fit


def test_the_interval_is_the_one_that_loses_least():
    wait, mean, restart = 20.0, 4 * 3600.0, 100.0
    chosen = checkpoint_interval(wait, mean)
    best = lost_share(chosen, wait, 0.0, restart, mean)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert lost_share(factor * chosen, wait, 0.0, restart, mean) > best - 1e-4
    assert chosen == pytest.approx((2 * wait * mean) ** 0.5, rel=0.1)


def test_a_played_training_takes_what_the_formula_says():
    """On average over many: a training of 100 hours with a failure every five."""
    hardware = replace(H200, failure_hours=40.0, restart_s=600.0, storage_bytes_per_s=1e5, copy_bytes_per_s=5e4)
    plan = make_plan(JOB, replace(hardware, flops_per_s=1e9))
    plan = replace(plan, steps=100 * 3600 / plan.step_s)
    useful = plan.steps * plan.step_s / 3600
    assert useful == pytest.approx(100) and 0.05 < plan.overhead < 0.4
    played = [simulate(plan, hardware, JOB.num_workers, seed)[0] for seed in range(40)]
    assert sum(played) / len(played) == pytest.approx(useful / (1 - plan.overhead), rel=0.06)


def test_without_failures_only_checkpoints_cost():
    hardware = replace(H200, failure_hours=1e12)
    plan = replace(make_plan(JOB, hardware), checkpoint_every_s=100.0, checkpoint_wait_s=1.0, steps=1000.0, step_s=1.0)
    hours, failures = simulate(plan, hardware, 8)
    assert failures == 0 and hours * 3600 == pytest.approx(1010)


def test_the_command_prints_a_table(capsys):
    config = "pipelines/configs/size_200m.yaml"
    assert main(["plan", "--config", config, "--gpus", "8", "512", "--tokens", "1e12", "--rows-per-gpu", "256"]) == 0
    out = capsys.readouterr().out
    assert "8 workers" in out and "512 workers" in out and "bottleneck" in out and "checkpoint every" in out
    assert main(["plan", "--config", config, "--gpus", "0", "--tokens", "1"]) == 2
    assert "--gpus and --tokens must be above 0" in capsys.readouterr().err


def test_words_are_those_of_the_tokenizer_that_is_given(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(["a b c"], TokenizerConfig())
    save_pretrained(tmp_path / "m", build_model(tiny_config(), tokenizer.vocab_size, 0).eval(), tokenizer, DETAILS)
    seen = []
    monkeypatch.setattr("pipelines.plan.make_plan", lambda job, on: seen.append(job.vocab_size) or make_plan(job, on))
    for setting in (
        "tokenizer: {vocab_size: 300}",
        f"tokenizer: {{path: {tmp_path / 'm'}}}",
        f"init_from: {tmp_path / 'm'}",
    ):
        (tmp_path / "c.yaml").write_text(setting)
        assert main(["plan", "--config", str(tmp_path / "c.yaml"), "--gpus", "1", "--tokens", "1e9"]) == 0
    assert seen == [300, tokenizer.vocab_size, tokenizer.vocab_size]


def test_what_would_be_nonsense_is_refused(capsys):
    plan = ["plan", "--config", "pipelines/configs/size_200m.yaml", "--tokens", "1e12", "--gpus", "512"]
    assert main(plan) == 2
    assert "512 workers share the 64 rows" in capsys.readouterr().err
    for constant in ("efficiency", "failure-hours"):
        assert main([*plan, "--rows-per-gpu", "8", f"--{constant}", "0"]) == 2
        assert f"--{constant} must be above 0, got 0.0" in capsys.readouterr().err


def test_an_average_of_the_weights_takes_memory_and_time():
    plain, averaged = (make_plan(replace(JOB, averaged=kept), H200) for kept in (False, True))
    everything, _ = num_parameters(JOB)
    assert averaged.weights_bytes - plain.weights_bytes == 4 * everything
    assert averaged.checkpoint_wait_s > plain.checkpoint_wait_s


def test_a_gpu_is_known_by_its_drivers_name():
    assert peak_flops("NVIDIA H200") == HARDWARE["h200"].flops_per_s
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Tesla T4") is None


def test_collectives_that_take_the_workers_own_cores_come_on_top():
    job = replace(JOB, num_workers=2)
    hardware = replace(H200, node_bytes_per_s=1e15, latency_s=1e-9, cores=1e9)
    free, own = make_plan(job, hardware), make_plan(job, replace(H200, overlap=0.0, cores=1e9))
    assert free.step_s == pytest.approx(free.compute_s)
    assert own.step_s == pytest.approx(own.compute_s + own.communicate_s) and own.communicate_s > 0


def test_as_many_cores_read_as_a_worker_needs_not_to_wait():
    plan = make_plan(JOB, H200)
    assert plan.tokens_per_s_each * JOB.num_workers == pytest.approx(plan.tokens_per_s)
    enough = make_plan(JOB, replace(H200, cores=plan.reading_cores * 1.01))
    few = make_plan(JOB, replace(H200, cores=plan.reading_cores * 0.5))
    assert enough.bottleneck != "reading data" and few.bottleneck == "reading data"
    assert few.step_s == pytest.approx(2 * enough.step_s)


def test_workers_reading_and_ray_share_a_nodes_cores():
    """Half a core is Ray's: of two cores one worker does not notice, of two workers each waits, three share."""
    apart = replace(H200, node_bytes_per_s=1e15, latency_s=1e-9, workers_per_node=3, cores=1.0)
    shared = replace(apart, shared_cores=2.0, ray_cores=0.5)
    for workers, times in ((1, 1.0), (2, 1 / (1 - 0.5)), (3, 3 / (2 - 0.5))):
        job = replace(JOB, num_workers=workers, batch_rows=64 * workers)
        own = make_plan(job, replace(apart, tokens_per_core_s=1e30)).step_s
        assert make_plan(job, replace(shared, tokens_per_core_s=1e30)).step_s == pytest.approx(times * own)
    read_s = make_plan(JOB, apart).read_s
    assert shared_step_s(1.0, read_s, 2, shared) == pytest.approx((1 + 2 * read_s) / 0.5)


def test_each_pass_through_a_block_has_a_part_that_rows_do_not_change():
    """Two encoders of one and two blocks, three flow blocks at t = 0, at t and for two more solver steps, a decoder."""
    fast = replace(H200, tokens_per_core_s=1e30)
    job = replace(JOB, num_workers=1)
    assert block_passes(job) == 1 + 2 + (1 + 3) * 3 + MODEL.decoder_blocks
    plain, with_starts = (make_plan(job, replace(fast, block_s=s)) for s in (0.0, 0.1))
    assert with_starts.step_s == pytest.approx(plain.step_s + 0.1 * block_passes(job))


def test_a_full_node_computes_with_what_crowding_leaves():
    crowded = replace(H200, crowding=0.5, workers_per_node=3)
    times = [make_plan(replace(JOB, num_workers=n, batch_rows=64 * n), crowded).compute_s for n in (1, 2, 3, 6)]
    assert [times[0] / t for t in times] == pytest.approx([1, 0.75, 0.5, 0.5])


def test_a_baseline_is_not_planned_as_the_yan_beside_it(tmp_path, capsys):
    (tmp_path / "ar.yaml").write_text("baseline: {family: ar}\nstages: {autoencoder: {max_steps: 0}}\n")
    assert main(["plan", "--config", str(tmp_path / "ar.yaml"), "--tokens", "1e9", "--gpus", "2"]) == 2
    assert "is of a baseline, ar; plans are for a YAN" in capsys.readouterr().err


def test_constants_come_from_a_file_and_flags_go_before_it(tmp_path, capsys):
    file = tmp_path / "constants.json"
    plan = ["plan", "--config", "pipelines/configs/size_200m.yaml", "--tokens", "1e9", "--gpus", "2"]

    def step(*more: str) -> str:
        assert main([*plan, "--constants", str(file), *more]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step "))

    file.write_text(json.dumps({**vars(H200), "efficiency": 0.2}))
    slow = step()
    assert step("--efficiency", "0.4") != slow
    assert main([*plan, "--efficiency", "0.2"]) == 0 and slow in capsys.readouterr().out
    for text, message in (
        ('{"eficiency": 0.2}', "unknown name 'eficiency'; did you mean 'efficiency'?"),
        ('{"efficiency": "half"}', "must be a JSON object of numbers by name"),
        ('{"efficiency": 0}', "--efficiency must be above 0, got 0"),
        ('{"shared_cores": 2, "ray_cores": 3}', "--ray-cores must be below --shared-cores=2, got 3"),
        ("no", "Expecting value"),
    ):
        file.write_text(text)
        assert main([*plan, "--constants", str(file)]) == 2
        assert message in capsys.readouterr().err
