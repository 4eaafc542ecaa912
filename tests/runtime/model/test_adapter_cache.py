"""More adapters than there is room for, each there when rows ask for it."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler import AdapterCache, CheckpointError, UsageError
from tests import zoo

IDS = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(0))
COUNT = 9


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for number in range(COUNT):
        model = compiler.apply(zoo.make("llama"), f"adapter default = lora(rank = {2 + number % 3}) {{ on q_proj }}")
        torch.manual_seed(number)
        with torch.no_grad():
            for each in model.adapter_bank.parameters():
                each.add_(torch.randn_like(each) * 0.3)
        model.save_pretrained(root / f"n{number}")
    (root / "notes").mkdir()
    return root


@pytest.fixture
def model() -> Any:
    return compiler.apply(zoo.make("llama"), "adapter own = ia3 { on k_proj }").eval()


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def test_rows_have_what_they_ask_for(model: Any, directory: Path) -> None:
    cache = AdapterCache(model, directory, capacity=3)
    assert cache.names == tuple(f"n{number}" for number in range(COUNT))
    for start in (0, 2, 5, 1, 7):
        names = [f"n{(start + row) % COUNT}" for row in range(3)]
        mixed = model(input_ids=IDS, adapter_names=cache.fetch(names)).logits
        assert cache.held == tuple(names)
        for row, name in enumerate(names):
            alone = compiler.load(zoo.make("llama"), directory / name).eval()
            assert_close(mixed[row], alone(input_ids=IDS[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)
    assert model.active_adapters() == ["own"]
    assert set(model.peft_config) == {"own", *cache.held}
    cache.clear()
    assert set(model.peft_config) == {"own"}


def test_who_was_asked_for_least_recently_leaves(model: Any, directory: Path) -> None:
    cache = AdapterCache(model, {name: directory / name for name in ("n0", "n1", "n2", "n3")}, capacity=2)
    assert cache.fetch(["n0", "n1", "own", "__base__"]) == ["n0", "n1", "own", "__base__"]
    cache.fetch(["n0"])
    cache.fetch(["n2"])
    assert cache.held == ("n0", "n2")
    model.delete_adapter("n0")  # by hand
    cache.fetch(["n2", "n3"])
    assert cache.held == ("n2", "n3")


def test_memory_is_that_of_the_capacity(model: Any, directory: Path) -> None:
    """What leaves is gone, from what is laid out for rows too."""
    cache, seen = AdapterCache(model, directory, capacity=3), []
    for start in range(0, COUNT, 3):
        names = cache.fetch([f"n{start + row}" for row in range(3)])
        model(input_ids=IDS, adapter_names=names)
        seen += [
            weakref.ref(
                next(iter(model.adapter_bank.get_submodule(name).buffers()), None)
                or next(iter(model.adapter_bank.get_submodule(name).parameters()))
            )
            for name in names
        ]
    gc.collect()
    assert [each() is not None for each in seen] == [False] * (COUNT - 3) + [True] * 3


def test_coming_and_going_makes_no_other_program(model: Any, directory: Path) -> None:
    cache = AdapterCache(model, directory, capacity=3)
    model(input_ids=IDS, adapter_names=cache.fetch(["n0", "n1", "n2"]))
    made = model._adapter_state.host._templates.copy()
    tenants = list(model._adapter_state.rows._now.known.values())
    model(input_ids=IDS, adapter_names=cache.fetch(["n3", "n4", "n5"]))
    assert model._adapter_state.host._templates == made
    assert list(model._adapter_state.rows._now.known.values()) == tenants


def test_what_is_refused_changes_nothing(model: Any, directory: Path, tmp_path: Path) -> None:
    cache = AdapterCache(
        model, {**{f"n{number}": directory / f"n{number}" for number in range(3)}, "lost": tmp_path}, 2
    )
    cache.fetch(["n0", "n1"])
    with pytest.raises(UsageError, match=r"E533.*3 adapters.*room for 2"):
        cache.fetch(["n0", "n1", "n2"])
    with pytest.raises(UsageError, match=r"E510.*nobody"):
        cache.fetch(["n2", "nobody"])
    with pytest.raises(UsageError, match="E510"):
        cache.prefetch(["nobody"])
    assert cache.held == ("n0", "n1")
    with pytest.raises(CheckpointError):
        cache.fetch(["lost"])
    assert set(cache.held) == set(model.peft_config) - {"own"}
    cache.fetch(["n0", "n1"])


def test_what_a_cache_is_made_of(model: Any, directory: Path, tmp_path: Path) -> None:
    for wrong in (lambda: AdapterCache(zoo.make("llama"), directory), lambda: AdapterCache(model, directory, 0)):
        with pytest.raises(UsageError, match="E533"):
            wrong()
    with pytest.raises(UsageError, match=r"E533.*no directory"):
        AdapterCache(model, tmp_path)
    with pytest.raises(UsageError, match=r"E533.*'own'"):
        AdapterCache(model, {"own": directory / "n0"})


def test_prefetched(model: Any, directory: Path) -> None:
    cache = AdapterCache(model, directory, capacity=2)
    cache.prefetch(["n0", "n1", "own"])
    cache.prefetch(["n0"])
    assert cache.held == ()
    assert cache._reader is not None
    cache._reader.shutdown(wait=True)
    assert cache.fetch(["n0"]) == ["n0"]
