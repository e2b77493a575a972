"""The quality benchmark for a machine with yan_core alone: the pack, equal compute, and going on where it stopped."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import speed
from pipelines.benchmarks import quality_gpu
from pipelines.contestants import CONTESTANTS
from pipelines.encode import SCHEMAS
from pipelines.packed import PackError, open_pack, pack
from pipelines.prepare import Prepared
from pipelines.results import page
from pipelines.world import WorldConfig, examples, stories
from yan_core.config import RunConfig, TokenizerConfig, from_dict, to_dict
from yan_core.tokenization import Tokenizer

ABSENT = ("ray", "mlflow", "jsonargparse", "pyarrow", "rouge_score", "sacrebleu", "matplotlib")
TIMES = ("latency_ms_batch_1", "speed")

CONFIG = from_dict(
    RunConfig,
    {
        "name": "tiny",
        "data": {"max_target_tokens": 4, "max_source_tokens": 48, "pool_batches": 2, "lanes": 4},
        "model": {"d_model": 16, "num_heads": 2, "num_experts": 2, "dropout": 0.1},
        "stages": {
            "autoencoder": {"max_steps": 8, "batch_size": 8, "trains": ["target_encoder", "decoder"]},
            "flow": {"max_steps": 12, "batch_size": 8},
            "finetune": {"max_steps": 60, "batch_size": 8, "optim": {"ema_decay": 0.5}},
        },
        "flow_loss": {"solver_steps": [1, 2]},
        "evaluation": {"num_steps": [1, 3], "max_rows": 12},
        "scaling": {"num_workers": 1},
    },
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """Shards as `yan prepare` writes them, without Ray: a corpus of which an epoch reads a part, the task's rows."""
    folder, world = tmp_path_factory.mktemp("prepared"), WorldConfig(seed=3, kinds=("where",))
    rows = [{"source": f"{r['context']} {r['question']}", "target": r["answer"]} for r in examples(world, 0, 60)]
    texts = [r["text"] for r in stories(world, 0, 50)]
    tokenizer = Tokenizer.train([*texts, *(f"{r['source']} {r['target']}" for r in rows)], TokenizerConfig())
    (folder / "tokenizer.json").write_text(tokenizer.to_json())

    def ids(text: str, longest: int) -> list[int]:
        return tokenizer.encode_batch([text])[0].ids[:longest]

    pairs = [{"source": ids(r["source"], 48), "target": ids(r["target"], 4)} for r in rows[:48]]
    windows = [{"target": ids(text, 5 + i % 20)} for i, text in enumerate(texts)]
    held_out = [{**row, "answers": [row["target"], "nowhere"], "kind": "where"} for row in rows[48:]]
    parts = {
        "finetune/own-000000-0000.parquet": (pairs[:30], "finetune", "own"),
        "finetune/own-000000-0001.parquet": (pairs[30:], "finetune", "own"),
        "flow/own-000000-0000.parquet": (windows[:20], "flow", "own"),
        "flow/other-000000-0000.parquet": (windows[20:], "flow", "other"),
        "validation/own-000000-0000.parquet": (held_out, "text", "own"),
    }
    files = {}
    for name, (values, schema, source) in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(values, SCHEMAS[schema]), folder / name, row_group_size=7)
        files[name] = {"rows": len(values), "source": source}
    manifest = {"files": files, "mixture": {"other": 0.5}, "vocab_size": tokenizer.vocab_size}
    return Prepared(folder, manifest)


@pytest.fixture(scope="module")
def packed(prepared, tmp_path_factory):
    return pack(prepared, CONFIG, tmp_path_factory.mktemp("packs") / "tiny", 1_000_000)


@pytest.fixture(scope="module", autouse=True)
def few_requests():
    """Speed is measured on few requests, since it is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "REQUESTS", 2)
        patch.setattr(speed, "BATCH", 2)
        yield


@pytest.fixture(scope="module")
def undisturbed(packed, tmp_path_factory) -> Path:
    pytest.importorskip("transformers", reason="the extra `baselines` is not installed")
    output = tmp_path_factory.mktemp("undisturbed")
    assert quality_gpu.main(["run", "--shards", str(packed.folder), "--output", str(output), "--minutes", "60"]) == 0
    return output


def report_in(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def figures(entry: dict) -> dict:
    """What does not depend on the clock."""
    quality = [{name: value for name, value in q.items() if name not in TIMES} for q in entry["quality"]]
    return {name: entry[name] for name in ("training_flops", "training_steps", "parameters")} | {"quality": quality}


@pytest.mark.parametrize("stage", ["autoencoder", "flow", "finetune"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_pack_gives_the_batches_of_the_prepared_data(prepared, packed, stage, step):
    one, other = prepared.batches(CONFIG, stage, step), open_pack(packed.folder).batches(CONFIG, stage, step)
    steps = 0
    for ours, theirs in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))
        steps += 1
    assert steps == getattr(CONFIG.stages, stage).max_steps - step


def test_a_pack_keeps_validation_rows_tokenizer_and_config(prepared, packed):
    again = open_pack(packed.folder)
    assert again.config == CONFIG and again.about["validation"] == prepared.validation(12)
    assert again.tokenizer.to_json() == prepared.tokenizer.to_json()


def test_a_pack_that_is_too_large_is_refused_with_what_to_do(prepared, tmp_path):
    with pytest.raises(PackError, match=r"takes 0\.\d MB of the 0.001 MB allowed, for 48 rows and 50 .*: name fewer"):
        pack(prepared, CONFIG, tmp_path / "pack", 1_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_the_command_packs_what_it_prepares(tmp_path, capsys):
    world = WorldConfig(seed=3)
    for split, rows in (("train", 60), ("validation", 5)):
        lines = [json.dumps(row) + "\n" for row in examples(world, 0, rows, split)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    own = {"format": "jsonl", "train": "train.jsonl", "validation": "validation.jsonl"}
    settings = {"data": {"root": str(tmp_path), "dataset": "own", "datasets": {"own": own}}}
    (tmp_path / "own.yaml").write_text(json.dumps({**settings, "name": "own", "runs_dir": str(tmp_path / "runs")}))
    args = ["pack", "--config", str(tmp_path / "own.yaml"), "--scaling.num_workers", "1"]
    assert quality_gpu.main([*args, "--output", str(tmp_path / "pack")]) == 0
    assert "5 validation rows" in capsys.readouterr().out
    packed = open_pack(tmp_path / "pack")
    assert packed.config.name == "own" and len(packed.about["validation"]) == 5
    assert sum(shard.rows for shard in packed.shards("finetune")) == 60
    assert quality_gpu.main([*args, "--output", str(tmp_path / "other"), "--init_from", str(tmp_path)]) == 1
    assert "must be of a YAN with fresh weights" in capsys.readouterr().err


def test_a_folder_without_a_pack_is_refused(tmp_path, capsys):
    assert quality_gpu.main(["run", "--shards", str(tmp_path), "--output", "x", "--minutes", "1"]) == 1
    assert "is no pack, it has no ids.safetensors.xz" in capsys.readouterr().err


def test_all_contestants_are_compared_at_equal_compute(undisturbed):
    report = report_in(undisturbed)
    assert list(report["contestants"]) == list(CONTESTANTS) and report["rows"] == 12
    spent = [of["training_flops"] for of in report["contestants"].values()]
    assert max(spent) / min(spent) < 1.05
    for of in report["contestants"].values():
        assert of["training_s"] > 0 and {str(q["num_steps"]) for q in of["quality"]} == set(of["speed"])
    text = page([report])
    assert all(of["label"] in text for of in report["contestants"].values()) and "the best baseline" in text
    assert (undisturbed / "report.md").read_text() in text


def test_what_is_done_is_not_done_again(packed, undisturbed, monkeypatch):
    monkeypatch.setattr(quality_gpu, "train", lambda *_: pytest.fail("trained again"))
    before = report_in(undisturbed)["contestants"]
    for path in undisturbed.iterdir():  # the results alone are enough, as on another machine
        if path.name.startswith("report"):
            path.unlink()
    assert quality_gpu.run(packed, undisturbed, 60)
    assert report_in(undisturbed)["contestants"] == before


def test_an_interrupted_comparison_comes_to_the_same_figures(packed, undisturbed, tmp_path, capsys):
    args = ["run", "--shards", str(packed.folder), "--output", str(tmp_path), "--contestants"]
    for name, names in (("yan", ["yan"]), ("ar", ["yan", "ar"])):
        for _ in range(10):  # a step at a time, over the end of a stage
            assert quality_gpu.main([*args, *names, "--minutes", "0"]) == os.EX_TEMPFAIL
        assert "time is up" in capsys.readouterr().out
        assert list((tmp_path / name).glob("*.unfinished"))
        assert quality_gpu.main([*args, *names, "--minutes", "60"]) == 0
    found, expected = report_in(tmp_path)["contestants"], report_in(undisturbed)["contestants"]
    assert list(found) == ["yan", "ar"]
    for name, of in found.items():
        assert figures(of) == figures(expected[name])


def test_other_settings_are_another_training(packed, tmp_path, capsys):
    assert not quality_gpu.run(packed, tmp_path, 0, ["yan"])
    assert not quality_gpu.run(packed, tmp_path, 0, ["yan"], share=0.5)
    out = capsys.readouterr().out
    assert "trained anew" in out and "'finetune': 30" in out
    config = quality_gpu.compared(packed, 0.5, False)
    assert config.stages.finetune.optim.warmup_steps == math.ceil(0.5 * CONFIG.stages.finetune.optim.warmup_steps)


@pytest.mark.parametrize("task", ["question_answering", "continuation"])
def test_it_runs_where_the_other_libraries_are_not_installed(prepared, tmp_path, task):
    """The pack is made here; in the fresh interpreter importing what is not on such a machine fails."""
    settings = to_dict(CONFIG)
    settings["data"]["task"] = task
    pack(prepared, from_dict(RunConfig, settings), tmp_path / "pack", 1_000_000)
    names = ["yan", "masked_diffusion"] if task == "continuation" else ["yan", "ar"]
    args = ["run", "--shards", str(tmp_path / "pack"), "--output", str(tmp_path / "out"), "--minutes", "60"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
from pipelines.benchmarks.quality_gpu import main
sys.exit(main({[*args, "--share", "0.2", "--contestants", *names]!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entries = report_in(tmp_path / "out")["contestants"]
    assert list(entries) == names
    for of in entries.values():
        (quality, *_) = of["quality"]
        assert quality["metric"] == ("exact_match" if task == "question_answering" else "token_f1")
        assert "token_f1" in quality["metrics"] and not any("rouge" in m or m == "bleu" for m in quality["metrics"])
    assert "| YAN |" in done.stdout
