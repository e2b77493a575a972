"""MLflow's pages over a real PostgreSQL in headless Chromium: a run with its chart, and the registered model."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from pipelines.tracking import Tracker
from tests.clusters.test_migration import mlflow_server
from yan_core.config import RunConfig, TrackingConfig

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def browser() -> Iterator:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(word)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def test_a_run_and_the_registry_are_shown(postgresql: str, browser, tmp_path: Path):
    """Screenshots stay in YAN_SCREENSHOTS where that is set."""
    from selenium.webdriver.support.ui import WebDriverWait

    upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", f"postgresql://{postgresql}"]
    subprocess.run(upgrade, check=True, capture_output=True, timeout=120)
    shots = Path(os.environ.get("YAN_SCREENSHOTS") or tmp_path / "shots")
    shots.mkdir(parents=True, exist_ok=True)
    with mlflow_server(f"postgresql://{postgresql}", str(tmp_path / "artifacts"), tmp_path / "log") as url:
        config = RunConfig(name="world-by-night", runs_dir=str(tmp_path), tracking=TrackingConfig(uri=url))
        run = Tracker.start(config, None)
        for step in range(20):
            run.metrics({"train/loss": 1 / (step + 1)}, step)
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        run.register(model, "yan-world", "champion")
        run.finish("FINISHED")
        experiment = mlflow.MlflowClient(url).get_run(run.run_id).info.experiment_id
        pages = {
            "run": (f"experiments/{experiment}/runs/{run.run_id}", ["world-by-night", "train/loss"]),
            "registry": ("models/yan-world", ["yan-world", "champion"]),
        }
        for name, (path, words) in pages.items():
            browser.get(f"{url}/#/{path}")
            WebDriverWait(browser, 60).until(
                lambda page, words=words: all(word in page.find_element("tag name", "body").text for word in words)
            )
            assert browser.save_screenshot(str(shots / f"{name}.png"))
            assert (shots / f"{name}.png").stat().st_size > 20_000
