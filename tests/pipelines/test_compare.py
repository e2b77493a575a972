"""Comparing models: equal data, size and compute; variants from a file; tables and pictures of a report."""

import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipelines
from pipelines.arguments import UsageError, parse_config
from pipelines.cli import main
from pipelines.cluster import ray_session
from pipelines.compare import CONTESTANTS, Contestant, compare, entered, merged, read_variants, with_compute
from pipelines.compute import step_flops, training_flops
from pipelines.contestants import with_steps
from pipelines.prepare import prepare
from pipelines.results import (
    commits,
    differences,
    headline,
    main_quality,
    over_seeds,
    pictures,
    shown,
    with_other_seeds,
)
from pipelines.results import main as write_page
from pipelines.run import run
from yan_core.config import OptimConfig, RunConfig, StageConfig, from_dict, to_dict
from yan_core.model import build_model

CONFIGS = Path(pipelines.__file__).parent / "configs"
BASELINES = [name for name, contestant in CONTESTANTS.items() if contestant.family]


@pytest.fixture(scope="module")
def config(tiny_settings, tmp_path_factory) -> RunConfig:
    settings = merged(tiny_settings, {"runs_dir": str(tmp_path_factory.mktemp("runs"))})
    data = {"datasets": {"small": {"format": "world", "num_train": 200, "num_validation": 30}}}
    return from_dict(RunConfig, merged(settings, {"data": data, "scaling": {"num_workers": 1}}))


@pytest.fixture(scope="module")
def prepared(config, tmp_path_factory):
    with ray_session(1, 1):
        yield prepare(config, tmp_path_factory.mktemp("data") / "prepared")


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_the_size_and_the_rows_of_the_run_compared(config, name):
    own = entered(name, CONTESTANTS[name], config, 3_000_000)
    assert own.baseline is not None and own.baseline.family == CONTESTANTS[name].family
    model = build_model(own.baseline, 100, 0)
    assert model.num_parameters(embeddings=False) == pytest.approx(3_000_000, rel=0.1)
    small = entered(name, CONTESTANTS[name], config, 100_000).baseline
    assert small is not None and small.num_blocks >= (2 if name == "encoder_decoder" else 4)
    assert own.name == f"tiny-{name}" and not own.tracking.model_name and own.seed == config.seed
    assert (own.data, own.tokenizer) == (config.data, config.tokenizer)
    assert own.stages.finetune == replace(config.stages.finetune, trains=("flow",))


@pytest.mark.ray
@pytest.mark.parametrize("name", ["plain", *BASELINES])
def test_every_contestant_gets_the_same_compute(config, prepared, name):
    longer = from_dict(RunConfig, merged(to_dict(config), {"stages": {"finetune": {"max_steps": 400}}}))
    budget = training_flops(longer, prepared)
    own = with_compute(entered(name, CONTESTANTS[name], longer, 30_000), prepared, budget)
    found = {stage: getattr(own.stages, stage).max_steps for stage in budget}
    spent = sum(training_flops(own, prepared).values())
    assert spent == pytest.approx(sum(budget.values()), rel=0.05)
    assert (found["autoencoder"] == 0) == (name in BASELINES)


def test_a_contestants_warm_up_and_curriculum_take_the_share_of_its_steps_that_they_have_in_the_run_compared():
    settings = to_dict(StageConfig(max_steps=1600, curriculum_steps=400, optim=OptimConfig(warmup_steps=100)))
    fewer = with_steps(settings, 560)
    assert (fewer["max_steps"], fewer["curriculum_steps"], fewer["optim"]["warmup_steps"]) == (560, 140, 35)
    assert with_steps(settings, 1600) == settings


@pytest.mark.ray
def test_counting_operations_leaves_no_trace_and_follows_the_solver_steps(config, prepared):
    cheap = from_dict(RunConfig, merged(to_dict(config), {"flow_loss": {"solver_steps": [1]}}))
    dear = from_dict(RunConfig, merged(to_dict(config), {"flow_loss": {"solver_steps": [9]}}))
    assert step_flops(cheap, prepared, "finetune") == step_flops(cheap, prepared, "finetune")
    assert step_flops(dear, prepared, "finetune") > 2 * step_flops(cheap, prepared, "finetune")


def test_variants_are_read_nested_or_dotted(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text(
        "k8:\n  label: eight experts\n  settings: {model.num_experts: 8, model: {top_k: 2}}\nplain2: {compute: 4}\n"
    )
    assert read_variants(str(file)) == {
        "k8": Contestant("eight experts", {"model": {"num_experts": 8, "top_k": 2}}),
        "plain2": Contestant("plain2", compute=4.0),
    }


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("variants/*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("base", ["world", "ag_news"])
def test_shipped_variants_fit_the_recipes(path, base):
    config = parse_config("compare", ["--config", str(CONFIGS / f"{base}.yaml")])
    variants = read_variants(str(path))
    found = {name: entered(name, contestant, config, 1_000_000) for name, contestant in variants.items()}
    assert found and all(own != config for own in found.values())


@pytest.mark.parametrize("text", ["[]", "k8: 3", "k8: {setting: {}}", "k8: {settings: 4}", "k8: {compute: 0}"])
def test_a_file_that_holds_no_variants_is_refused(tmp_path, text):
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(UsageError, match="--variants .*v.yaml: .*`label`, `settings` and `compute`"):
        read_variants(str(tmp_path / "v.yaml"))


@pytest.mark.parametrize("text", ["ar: {}", "k8: {settings: {data.max_source_tokens: 9}}", "k: {settings: {seed: 1}}"])
def test_a_variant_leaves_alone_what_all_have_in_common(tmp_path, text):
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(UsageError, match="must have a name of its own and leave data, tokenizer, seed"):
        read_variants(str(tmp_path / "v.yaml"))


def test_a_misspelt_contestant_is_refused_before_anything_starts(capsys):
    assert main(["compare", "--config", "pipelines/configs/world.yaml", "--contestants", "encoder_decodr"]) == 2
    assert "did you mean 'encoder_decoder'?" in capsys.readouterr().err


def test_a_contestant_that_needs_what_is_not_installed_is_told_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["compare", "--config", "pipelines/configs/world.yaml", "--contestants", "plain", "ar"]) == 1
    told = capsys.readouterr().err
    assert "need transformers" in told and told.count("pip install") == 1 and "'.[baselines]'" in told


@pytest.mark.ray
def test_a_comparison_end_to_end_and_again(config, tmp_path, capsys):
    """YAN and GPT-2 on a tiny run: one table, pictures, a page; the second time nothing is trained."""
    chosen = {name: CONTESTANTS[name] for name in ("yan", "ar")}
    report = compare(config, chosen)
    assert list(report["contestants"]) == ["yan", "ar"]
    yan, ar = report["contestants"].values()
    assert yan["training_flops"] == pytest.approx(ar["training_flops"], rel=0.1)
    assert [q["num_steps"] for q in yan["quality"]] == [1, 3] and len(ar["quality"]) == 1
    assert all(speed["latency_ms_p50"] > 0 for of in (yan, ar) for speed in of["speed"].values())
    assert yan["speed"]["3"]["nfe"] == 3 and 1 <= ar["speed"]["1"]["nfe"] <= 14
    folder = tmp_path.joinpath(config.runs_dir, "tiny", "compare")
    assert {p.name for p in folder.iterdir()} == {
        "report.json", "report.md", "quality_by_latency.png", "quality_by_steps.png", "quality_by_size.png"
    }  # fmt: skip
    assert not (tmp_path / config.runs_dir / "tiny-yan").exists()  # it is the run compared itself
    assert json.loads((folder / "report.json").read_text()) == report
    capsys.readouterr()
    again = compare(config, chosen)
    assert "not done yet" not in capsys.readouterr().out
    for name in chosen:
        assert again["contestants"][name]["quality"] == report["contestants"][name]["quality"]
        assert again["contestants"][name]["training_s"] == report["contestants"][name]["training_s"] > 0
    write_page([str(folder / "report.json"), "--page", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "| autoregressive decoder (GPT-2) |" in text
    assert re.search(
        r"points (above|below) the best baseline, .* \(95 % interval over rows: [+-][\d.]+ to [+-][\d.]+\)", text
    )


@pytest.mark.ray
def test_what_begins_with_a_trained_model_is_compared_with_fresh_weights(config, tmp_path, capsys):
    """Same rows and tokenizer, equal compute after the start; another tokenizer is told before anything is trained."""
    other = replace(config, name="start", seed=7)
    start = Path(config.runs_dir, "start", "stages", "finetune")
    run(other, publish=False)
    variants = tmp_path / "v.yaml"
    variants.write_text(f"pretrained: {{settings: {{init_from: {start}, stages.autoencoder.max_steps: 0}}}}\n")
    recipe = tmp_path / "config.yaml"
    recipe.write_text(json.dumps(merged(to_dict(config), {"name": "after"})))
    command = ["compare", "--config", str(recipe), "--variants", str(variants), "--contestants", "yan", "pretrained"]
    assert main(command) == 2
    assert f"has another tokenizer than the run compared, which all share; give --tokenizer.path {start}" in (
        capsys.readouterr().err
    )
    assert main([*command, "--tokenizer.path", str(start), "--model.num_experts", "1"]) == 2
    assert "is of another architecture (num_experts: 1 -> 2); give it to the run compared" in capsys.readouterr().err
    assert not Path(config.runs_dir, "after").exists()
    assert main([*command, "--tokenizer.path", str(start)]) == 0
    report = json.loads(Path(config.runs_dir, "after", "compare", "report.json").read_text())
    fresh, pretrained = report["contestants"].values()
    assert fresh["training_steps"]["autoencoder"] > 0 == pretrained["training_steps"]["autoencoder"]
    assert pretrained["training_flops"] == pytest.approx(fresh["training_flops"], rel=0.1)
    prepared = [
        Path(config.runs_dir, name, "prepared", "tokenizer.json") for name in ("start", "after", "after-pretrained")
    ]
    assert len({file.read_text() for file in prepared}) == 1


def changed(
    label: str, family: str, rows: dict[int, list[float]], settings: dict[str, Any] | None = None, **metrics: float
) -> dict[str, Any]:
    """A contestant of a report, as far as differences and pictures read it: its rows' scores by number of steps."""
    quality = [
        {
            "num_steps": steps,
            "metric": "exact_match",
            "value": statistics.mean(of),
            "rows": of,
            "metrics": {"exact_match": statistics.mean(of), **metrics},
        }
        for steps, of in rows.items()
    ]
    speed = {str(steps): {"latency_ms_p50": 5.0 + steps, "nfe": steps} for steps in rows}
    found = {"label": label, "family": family, "quality": quality, "speed": speed, "settings": settings or {}}
    return {**found, "parameters_without_embeddings": 1_000_000}


def test_what_a_change_is_worth_is_told_beside_the_recipe_row_by_row():
    good, poor = [1.0] * 80 + [0.0] * 20, [1.0] * 60 + [0.0] * 40
    contestants: dict[str, Any] = {
        "yan": changed("YAN", "yan", {1: poor, 3: good, 8: good}, distinct_answers=0.5),
        "k1": changed("K = 1", "yan", {1: poor, 3: poor, 8: [1.0] * 100}),
        "ar": changed("GPT-2", "ar", {1: good}),
    }
    lines = differences({"contestants": contestants}).splitlines()
    assert "exact match at 3 steps" in lines[0]
    assert lines[4] == "| none | | 60.0 | 80.0 | 80.0 | 3 | 50 % | 1.00M |"
    found = re.fullmatch(
        r"\| K = 1 \| -20.0 \[-2\d\.\d, -1\d\.\d\] \| 60.0 \| 60.0 \| 100.0 \| 8 \|  \| 1.00M \|", lines[5]
    )
    assert found and len(lines) == 6
    assert differences({"contestants": {name: contestants[name] for name in ("yan", "ar")}}) == ""


def test_reports_of_other_seeds_go_into_a_table_of_the_first_one():
    def report(name: str, seed: int, steps: int = 9, **values: float) -> dict[str, Any]:
        config = {"name": f"{name}-here", "seed": seed, "stages": {"flow": {"max_steps": steps}}}
        of = {key: changed(key.upper(), "yan", {1: [0.0], 3: [value]}) for key, value in values.items()}
        return {"name": name, "config": config, "contestants": of}

    first, alone = report("world", 0, yan=0.5, k1=0.25, k2=1.0), report("events", 0, yan=0.5)
    others = [report("world_seed2", 2, yan=0.125), report("world_seed1", 1, k1=0.75, yan=1.0)]
    others[1]["contestants"]["k1"] = changed("K1", "ar", {1: [0.75]}, exact_match_drawn=0.5, distinct_answers=0.25)
    gathered, other = with_other_seeds([first, *others, alone])
    assert (gathered["name"], other["name"]) == ("world", "events") and over_seeds(other) == ""
    lines = over_seeds(gathered).splitlines()
    assert lines[2:] == [
        "| model | seed 0 | seed 1 | seed 2 | mean of 0, 1 | less YAN |",
        "|---|---:|---:|---:|---:|---:|",
        "| YAN | 50.0 | 100.0 | 12.5 | 75.0 |  |",
        "| K1 | 25.0 | 75.0 (50.0, 25 %) |  | 50.0 | -25.0, -25.0 |",
    ]
    with pytest.raises(ValueError, match=r"world_seed1 stands for another seed of world: .*max_steps: 9 -> 8"):
        with_other_seeds([first, report("world_seed1", 1, steps=8, yan=1.0)])
    with pytest.raises(ValueError, match="events_seed1 stands for another seed of events"):
        with_other_seeds([first, report("events_seed1", 1, yan=1.0)])


def test_the_number_of_experts_has_a_picture_where_it_varies_with_a_line_for_each_training():
    rows = {3: [1.0, 0.0]}
    ours = {f"k{k}": changed(f"K = {k}", "yan", rows, {"model": {"num_experts": k}}) for k in (1, 2)}
    flow = {"flow_loss": {"likelihood": "marginal"}}
    paper = {
        f"p{k}": changed(f"K = {k}, the paper's", "yan", rows, {"model": {"num_experts": k}, **flow}) for k in (1, 2, 8)
    }
    recipe = {"model": {"num_experts": 4}}
    report = {"name": "world", "config": recipe, "contestants": {"yan": changed("YAN", "yan", rows), **ours, **paper}}
    (axes,) = pictures(report)["quality_by_experts.png"].axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines} == {
        "our training": [1, 2, 4],  # the last is the recipe's own
        "the paper's": [1, 2, 8],
    }
    report["contestants"] = {name: report["contestants"][name] for name in ("yan",)}
    assert list(pictures(report)) == ["quality_by_latency.png", "quality_by_steps.png", "quality_by_size.png"]


def test_what_mixes_tokens_and_the_models_size_have_pictures_where_they_vary():
    rows = {1: [0.0, 0.0], 3: [1.0, 0.0]}
    report = {"name": "world", "contestants": {"yan": changed("YAN", "yan", rows)}}

    def add(name: str, settings: dict[str, Any]) -> None:
        report["contestants"][name] = changed(name, "yan", rows, settings)

    add("no_matching", {"model": {"source_encoder": {"matching_gain": 0.0}}})
    add("k1", {"model": {"num_experts": 1}})
    add("no_ce", {"flow_loss": {"weight_ce": 0.0}})
    report["contestants"]["ar"] = changed("ar", "ar", rows, {"baseline": {"family": "ar"}})
    assert "transformer_and_mamba.png" not in pictures(report)
    add("mamba", {"model": {"mixer": "mamba", "source_encoder": {"matching_gain": 0.0}}})
    (axes,) = pictures(report)["transformer_and_mamba.png"].axes
    assert [line.get_label() for line in axes.lines] == ["YAN", "no_matching", "mamba"]
    assert list(axes.lines[0].get_xdata()) == [6.0, 8.0] and list(axes.lines[0].get_ydata()) == [0.0, 0.5]
    assert shown(report) == {"quality_by_latency", "quality_by_experts", "transformer_and_mamba"}
    for width in (32, 96):
        add(f"w{width}", {"model": {"d_model": width}})
        report["contestants"][f"w{width}"]["parameters_without_embeddings"] = width * 10_000
    (axes,) = pictures(report)["quality_by_size.png"].axes
    assert list(axes.lines[-1].get_xdata()) == [0.32, 0.96, 1.0]
    assert "quality_by_size" in shown(report)


def test_a_report_tells_the_commits_of_its_models_apart_from_its_own():
    new, old = {"commit": "0123456789abcdef"}, {"commit": "fedcba9876543210-dirty"}
    report = {"commit": "aaaaaaaaaaaaaaaa", "contestants": {"yan": new, "ar": old, "k1": new}}
    assert commits(report) == "models of commit 0123456789ab, fedcba987654-dirty, measured at aaaaaaaaaaaa"
    assert commits({**report, "contestants": {"yan": {}}}) == "measured at aaaaaaaaaaaa"


def test_a_lead_over_baselines_that_learnt_nothing_is_told_as_such():
    contestants = {
        "yan": changed("YAN", "yan", {3: [1.0] * 9}),
        "ar": changed("GPT-2", "ar", {1: [1.0] * 4 + [0.0] * 5}),
    }
    report = {"contestants": contestants, "constant": {"answer": "the", "metric": "exact_match", "value": 0.5}}
    assert headline(report).startswith("No baseline is better than to answer “the” always (50.0): this says nothing")
    assert "YAN at 3 steps is 55.6 points above the best baseline, GPT-2" in headline(report)
    report["constant"]["value"] = 0.2
    assert headline(report).startswith("YAN at 3 steps is 55.6 points above")
    contestants["plain"] = changed("one expert", "yan", {3: [1.0] * 9})
    assert "0.0 points above the best baseline, one expert" in headline(report)


def test_masked_diffusion_stands_at_the_fewest_steps_that_are_as_good():
    rows = {1: [1.0] * 50 + [0.0] * 50, 2: [1.0] * 80 + [0.0] * 20, 4: [1.0] * 81 + [0.0] * 19}
    assert main_quality(changed("LLaDA", "masked_diffusion", rows))["num_steps"] == 2
