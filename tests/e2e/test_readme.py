"""README's blocks and those of docs/DATA.md and docs/EVALUATION.md run as they stand, in order, in a copy of the
repository; training is shortened, nothing else."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = (
    " --stages.autoencoder.max_steps 20 --stages.flow.max_steps 10 --stages.finetune.max_steps 20"
    " --evaluation.max_rows 20 --evaluation.num_steps [1,3]"
)

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(1200)]


def blocks() -> list[tuple[str, str]]:
    pages = (ROOT / "README.md", ROOT / "docs" / "DATA.md", ROOT / "docs" / "EVALUATION.md")
    return [block for page in pages for block in BLOCK.findall(page.read_text(encoding="utf-8"))]


def shortened(code: str) -> str:
    """Shorten every training command of a block; the two `make` commands are what runs this test."""
    lines = []
    for line in code.splitlines():
        if re.search(r"(yan|python -m pipelines) (run|train|compare)\b", line):
            line += SHORT
        if not line.startswith("make "):
            lines.append(line)
    return "\n".join(lines)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def by_itself() -> list[str]:
    """Puts a command into a world of processes of its own, where the kernel lets us: `ray stop` ends every Ray it sees,
    other tests' too."""
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    try:
        return alone if subprocess.run([*alone, "true"], capture_output=True).returncode == 0 else []
    except OSError:
        return []


def test_readme_blocks_run(tmp_path):
    shutil.copytree(ROOT, tmp_path / "yan", ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__"))
    (tmp_path / "yan" / ".venv").symlink_to(sys.prefix)
    home = tmp_path / "home"
    home.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(home), "PYTHONPATH": str(tmp_path / "yan")}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    port = free_port()
    found = blocks()
    assert len(found) >= 5
    for language, code in found:
        code = shortened(code).replace("8000", port)
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        if "ray stop" in code:
            command = [*by_itself(), *command]
        done = subprocess.run(
            command, cwd=tmp_path / "yan", env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{code}\n--- printed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    manifest = json.loads((tmp_path / "yan" / "runs" / "shop" / "prepared" / "manifest.json").read_text())
    assert manifest["filtered"]["train"] == 1 and manifest["bad_rows"]["train"] == 1
    assert manifest["dropped"] == {"duplicate": 1, "in validation": 1}
