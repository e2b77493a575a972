"""The option `--no-skips` of `make test-cluster`: a machine without its programs does not pass for a green one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNS = "def test_runs():\n    pass\n"
LEFT_OUT = "import pytest\n\n\ndef test_left_out():\n    pytest.skip('no such program')\n"


@pytest.mark.parametrize(
    ("text", "option", "status"),
    [
        (RUNS, ["--no-skips"], 0),
        (RUNS + LEFT_OUT, ["--no-skips"], 1),
        (RUNS + LEFT_OUT, [], 0),
    ],
)
def test_what_is_left_out_counts_as_failed(text: str, option: list[str], status: int, tmp_path: Path):
    (tmp_path / "test_some.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", "/dev/null", *option, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "1 left out count as failed" in done.stdout) == (status, bool(status)), done.stdout
