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


@pytest.mark.parametrize(("name", "rows"), [(name, rows) for name, _, _, rows in cases()])
def test_the_same_losses_and_the_same_adapters(results, name, rows):
    found, told = results
    losses, adapters = found["one process"][rows]
    for rank in found["ranks"]:
        assert name in rank, told
        own_losses, own = rank[name]
        torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=1e-5)
        assert own.keys() == adapters.keys()
        for key, value in adapters.items():
            torch.testing.assert_close(own[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_both_adapters_were_trained_by_row(results):
    alone = results[0]["one process"]
    plain, mixed = alone[""][1], alone[", by row"][1]
    assert {key[0] for key, each in mixed.items() if not torch.equal(each, plain[key])} == {"a", "b"}
