"""An adapted model in two real processes, wrapped as trainers wrap it, trains as it does in one."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.parity.training.sharded_run import SECONDS, cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("sharded") / "results"
    run = subprocess.run(
        [sys.executable, "-m", "tests.parity.training.sharded_run", str(file)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return torch.load(file) if file.exists() else {}, run.stderr[-4000:]


@pytest.mark.parametrize("name", [name for name, *_ in cases()])
def test_the_same_losses_and_the_same_adapter(results, name):
    found, told = results
    losses, adapter = found["one process"]
    for rank in found["ranks"]:
        assert name in rank, told
        own_losses, own = rank[name]
        torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=1e-5)
        assert own.keys() == adapter.keys()
        for key, value in adapter.items():
            torch.testing.assert_close(own[key], value, rtol=1e-4, atol=1e-5, msg=key)
