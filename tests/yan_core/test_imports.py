"""yan_core stands alone: in a fresh interpreter it brings in nothing of the pipelines' or the server's."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEVER = {
    "datasets",
    "jsonargparse",
    "mamba_ssm",
    "mlflow",
    "nltk",
    "pandas",
    "pipelines",
    "ray",
    "rouge_score",
    "sacrebleu",
    "serve",
    "starlette",
    "transformers",
}
CODE = """
import importlib, json, logging, pkgutil, sys
import yan_core
for module in pkgutil.walk_packages(yan_core.__path__, "yan_core."):
    importlib.import_module(module.name)
print(json.dumps({"modules": sorted(sys.modules), "handlers": len(logging.getLogger().handlers)}))
"""


def in_fresh_interpreter(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_every_module_of_yan_core_leaves_the_rest_out() -> None:
    found = in_fresh_interpreter(CODE)
    assert "yan_core.sampler" in found["modules"]
    assert not NEVER & {name.split(".")[0] for name in found["modules"]}
    assert found["handlers"] == 0
