"""Every built-in method, as an input of a program and in a bank that rows choose from: none is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc.compiler.export_model import entries, programs
from peftc.grammar.spec.library import builtin_methods
from peftc.passes.foreign.peft import BASE_ROWS
from tests.matrix import wide
from tests.parity.cases import low_rank, other, rotations
from tests.parity.programs import cases as cases

# What a method that is put in front cannot do without; the others are two tokens long.
FRONTS = {"multitask_prompt": "length = 2, tasks = 3", "cpt": "ids = [5, 6, 7], types = [1, 2, 3]"}
ALWAYS = ("vera", "cartridge")


def specs() -> dict[str, str]:
    """A method with its arguments and the places it goes to."""
    found: dict[str, str] = {}
    for case in (*low_rank.CASES, *low_rank.UNSAVED, *rotations.CASES, *other.CASES):
        if "llama" in case.models:
            found.setdefault(case.method, case.spec("llama").removeprefix("adapter a = "))
    for name, rule in builtin_methods().items():
        if rule.prompt is not None:
            found[name] = f"{name}({FRONTS.get(name, 'length = 2')})"
    found["trainable_tokens"] = f"trainable_tokens {{ tokens {cases.TOKENS} }}"
    return found


@pytest.fixture
def adapted(method: str) -> Iterator[Any]:
    host, spec = cases.host("llama"), specs()[method]
    inputs = {**_given(), **({"task_ids": torch.tensor([0, 2, 1])} if "tasks" in spec else {})}
    for seed, name in enumerate("ab"):
        host.add_adapter(f"adapter {name} = {spec}", calibration=[inputs])
        cases.move(host, name, seed, 0.1)
    host.set_adapter("a")
    yield host.eval()
    host.delete_adapter(host._adapter_state.names())


def _given() -> dict[str, torch.Tensor]:
    ids, mask = cases.text(3, 6, padded=True)
    return {"input_ids": ids, "attention_mask": mask}


def _called(adapted: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return adapted(**given, use_cache=False).logits


@pytest.mark.parametrize(
    ("method", "adapters"), wide([(name, how) for name in specs() for how in ("inputs", "routed")], ALWAYS)
)
def test_a_program_has_every_method(method: str, adapters: Any, adapted: Any) -> None:
    tasks = {"task_ids": torch.tensor([0, 2, 1])} if "tasks" in specs()[method] else {}
    given = {**_given(), **tasks}
    seen = given["attention_mask"].bool()
    results = {}
    for name in "ba":
        adapted.set_adapter(name)
        results[name] = _called(adapted, given)
    assert (results["a"] - results["b"])[seen].abs().max() > 1e-4
    (entered,) = entries.entered(adapted, "forward", tasks and given)
    made = programs.make(adapted, entered, adapters, "ab", max_batch_size=None, max_length=64)
    if any(each["name"] == "position_ids" for each in made.inputs):
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if adapters == "routed":
        names = dict(enumerate("ab"))
        if BASE_ROWS in made.rows:
            names[-1] = BASE_ROWS
            with adapted.disable_adapter():
                results[BASE_ROWS] = _called(adapted, given)
        assert (BASE_ROWS in made.rows) == (builtin_methods()[method].prompt is None)
        rows = torch.tensor([1, 0, min(names)])
        found = made({**given, "adapter_ids": rows})["logits"]
        expected = torch.stack([results[names[which]][row] for row, which in enumerate(rows.tolist())])
        assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-5)
        return
    for name, expected in results.items():
        found = made({**given, "adapter": programs.own_tensors(adapted, made, name)})["logits"]
        assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-5)


def test_every_method_is_met() -> None:
    # LoRA, over a quantized base; and what has other weights for every task: test_programs has its refusal
    assert set(specs()) == set(builtin_methods()) - {"loftq", "poly"}
