"""Rows of a task and texts of a corpus, in files of any format, and the settings that read them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from yan_core.config import RunConfig, from_dict

ROWS = [
    {
        "story": f"Mary went to room {i}. It was cold there.",
        "question": "Where is Mary?",
        "answer": f"room {i}",
        "task": t,
    }
    for i in range(20)
    for t in ("a", "b")
]


HELD_OUT = [{**row, "story": f"Then {row['story']}"} for row in ROWS]
"""Validation rows: what is the same is not trained on."""


def write(folder: Path, kind: str, rows=ROWS, name="rows") -> str:
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        names = list(rows[0])
        path.write_text("\n".join([",".join(names)] + [",".join(f'"{r[n]}"' for n in names) for r in rows]) + "\n")
    return str(path)


def config_for(tmp_path, kind="jsonl", rows=ROWS, **data) -> RunConfig:
    path = write(tmp_path, kind, rows) if rows is not None else data.pop("path")
    held_out = write(tmp_path, kind, HELD_OUT, "held_out") if rows is not None else data.pop("held_out", path)
    datasets = {
        "own": {
            "format": kind,
            "train": path,
            "validation": held_out,
            "columns": {"context": "story"},
            "where": {"task": "a"},
        }
    }
    data = {"dataset": "own", "datasets": datasets, "max_target_tokens": 4, **data}
    return from_dict(RunConfig, {"data": data})


def corpus_config(tmp_path, texts, **data) -> RunConfig:
    """A corpus of plain texts in two Parquet files beside a task's rows."""
    half = len(texts) // 2
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for i, part in enumerate((texts[:half], texts[half:])):
        pq.write_table(pa.table({"text": part}), folder / f"{i}.parquet")
    base = config_for(tmp_path, "parquet")
    sets = {"own": vars(base.data.datasets["own"]) | {"kinds": []}}
    sets["plain"] = {"format": "parquet", "train": str(folder)}
    return from_dict(RunConfig, {"data": {"dataset": "own", "corpus": "plain", "datasets": sets, **data}})


def windows_of(prepared) -> list[str]:
    table = pq.read_table([shard.path for shard in prepared.shards("flow")])
    return sorted(prepared.tokenizer.decode(r["target"]) for r in table.to_pylist())
