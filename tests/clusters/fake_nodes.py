"""Ray's fake provider of nodes, loaded by the autoscaler of test_autoscaler.py by name."""

from pathlib import Path
from typing import Any
from unittest import mock

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Nodes of this machine with a folder each: in the head's, they unpack a job's code again under its driver."""

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        folder = Path(self.provider_config["folder"]) / f"node{len(self._nodes)}-{self._next_node_id}"
        with_folder = mock.Mock(side_effect=lambda **given: real(**given, temp_dir=str(folder)))
        real = ray._private.parameter.RayParams
        with mock.patch("ray._private.parameter.RayParams", with_folder):
            super()._create_node_with_resources_and_labels(*args)
