"""Every file in clusters/ is read by the schema of the program that it is for, without an error."""

from pathlib import Path

import pytest

from tests.clusters.checks import CHECKS, CLUSTERS

FILES = sorted(path.relative_to(CLUSTERS).as_posix() for path in CLUSTERS.rglob("*") if path.is_file())


@pytest.mark.parametrize("file", FILES)
def test_file_has_one_checker_and_no_error(file: str):
    checkers = [check for pattern, check in CHECKS if Path(file).match(pattern)]
    assert len(checkers) == 1, f"clusters/{file} must match one pattern of CHECKS, matches {len(checkers)}"
    assert checkers[0](CLUSTERS / file) == []


def test_patterns_all_find_files():
    assert [pattern for pattern, _ in CHECKS if not list(CLUSTERS.glob(pattern))] == []


def test_clusters_holds_no_python():
    assert [file for file in FILES if file.endswith(".py")] == []
