"""A bucket in place of folders: data sets are read from it, checkpoints are kept in it."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipelines.checkpoints import Checkpoints
from pipelines.cluster import ray_session
from pipelines.listing import DataError, list_files, sizes_of
from pipelines.prepare import prepare
from tests.pipelines.test_checkpoints import NAMES, at, write
from yan_core.checkpoint import CheckpointError
from yan_core.config import RunConfig, from_dict

pytestmark = [pytest.mark.ray, pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True, scope="module")]

ROWS = [{"context": f"Mary went to room {i}.", "question": "Where?", "answer": f"room {i}"} for i in range(40)]


@pytest.fixture(scope="module", autouse=True)
def local_ray(bucket):  # whose workers inherit the environment that `bucket` set
    with ray_session(1, 1):
        yield


def test_a_damaged_checkpoint_in_a_bucket_is_passed_over(bucket):
    checkpoints = Checkpoints(f"{bucket}/checkpoints")
    assert checkpoints.newest() is None
    for step, name in enumerate(NAMES):
        write(checkpoints, name, step)
    assert checkpoints.newest() == (NAMES[2], at(2))
    store, path = fs.FileSystem.from_uri(f"{bucket}/checkpoints/{NAMES[2]}/model/weights")
    with store.open_output_stream(path) as out:
        out.write(b"other weights")
    with pytest.raises(CheckpointError, match="model/weights is damaged"):
        checkpoints.verify(NAMES[2])
    found = checkpoints.decide(["f"])
    assert found == checkpoints.decided() == (NAMES[1], at(1))
    with checkpoints.fetch(NAMES[1]) as folder:
        assert (folder / "model" / "weights").read_text() == "weights of step 1"
    checkpoints.remove(NAMES[1])
    assert checkpoints.names() == [NAMES[2], NAMES[0]]
    checkpoints.delete()
    assert checkpoints.names() == []


def test_a_data_set_in_a_bucket_gives_the_same_shards(bucket, tmp_path):
    for split, rows in (("train", ROWS[:30]), ("validation", ROWS[30:])):
        local = tmp_path / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), local)
        fs.copy_files(f"file://{local}", f"{bucket}/data/{split}.parquet")

    def config(root: str) -> RunConfig:
        own = {"format": "parquet", "train": "train.parquet", "validation": "validation.parquet"}
        return from_dict(RunConfig, {"data": {"dataset": "own", "datasets": {"own": own}, "root": root}})

    near = prepare(config(str(tmp_path)), tmp_path / "near", lambda _: None)
    far = prepare(config(f"{bucket}/data"), tmp_path / "far", lambda _: None)
    assert far.manifest["rows"]["finetune"] == 30 and far.manifest["rows"]["validation"] == 10
    assert [f["sha256"] for f in far.manifest["files"].values()] == [
        f["sha256"] for f in near.manifest["files"].values()
    ]
    assert list_files(f"{bucket}/data/tr*.parquet") == [f"{bucket}/data/train.parquet"]
    assert list_files(f"{bucket}/**/*.parquet") == [f"{bucket}/data/{s}.parquet" for s in ("train", "validation")]
    assert list_files(f"{bucket}/*.parquet") == []
    there = list_files(f"{bucket}/data")
    (tmp_path / "what?.jsonl").write_text("{}\n")
    assert sizes_of([str(tmp_path / "what?.jsonl")])[str(tmp_path / "what?.jsonl")][0] == 3
    sizes = sizes_of([*there, str(tmp_path / "train.parquet"), f"{bucket}/data/gone.parquet", "world"])
    assert list(sizes) == [*there, str(tmp_path / "train.parquet")]
    assert (
        sizes[there[0]][0] == sizes[str(tmp_path / "train.parquet")][0] == (tmp_path / "train.parquet").stat().st_size
    )
    assert list_files(f"{bucket}/data/[r-t]*.parquet") == [f"{bucket}/data/train.parquet"]
    assert list_files(f"{bucket}/data/[!t]*.parquet") == [f"{bucket}/data/validation.parquet"]
    with pytest.raises(DataError, match=f"no file at {bucket}/elsewhere/train.parquet"):
        prepare(config(f"{bucket}/elsewhere"), tmp_path / "none", lambda _: None)
