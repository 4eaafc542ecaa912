"""Prints how far every built-in method is from peft: method x model x direction x error.

    python -m tests.parity [METHOD ...]

`read` loads a checkpoint that peft wrote, `write` gives peft one that was written here. Errors are the largest
difference of the outputs over the size of the outputs; `-` is where peft does not have the method.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from peftc import compiler
from peftc.compiler.api import adapt
from tests.parity.cases.case import MODELS, Case
from tests.parity.method_cases import CASES, batch, moved, theirs
from tests.parity.models import test_convolutions

Run = Callable[[nn.Module], torch.Tensor]


@torch.no_grad()
def errors(
    model: nn.Module,
    adapted: compiler.AdaptedModel,
    wrapped: nn.Module,
    spec: str,
    move: Callable[[], object],
    run: Run,
) -> tuple[str, str]:
    """The error of reading and of writing; `move` takes what the spec says away from its start."""

    def off(found: torch.Tensor, wanted: torch.Tensor) -> str:
        return f"{float((found - wanted).abs().max() / wanted.abs().max()):.0e}"

    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(Path(folder) / "theirs")
        adapted.load_adapter(Path(folder) / "theirs", "loaded")
        try:
            read = off(run(adapted), run(wrapped))
            adapted.add_adapter(spec, "made", calibration=[batch()])
            move()
            adapted.save_pretrained(folder, selected_adapters=["made"])
            back = peft.PeftModel.from_pretrained(copy.deepcopy(model), Path(folder) / "made").eval()
            return read, off(run(back), run(adapted))
        finally:
            adapted.delete_adapter(adapted._adapter_state.names())


def of_case(case: Case, name: str, model: nn.Module, adapted: compiler.AdaptedModel) -> tuple[str, str]:
    """The errors on a language model."""
    inputs = batch()
    return errors(
        model,
        adapted,
        theirs(case, name, model),
        case.spec(name),
        lambda: moved(adapted, "adapter_bank.made", case.std),
        lambda each: each(**inputs).logits,
    )


def of_way(way: test_convolutions.Way) -> tuple[str, str]:
    """The errors on a net of convolutions."""
    torch.manual_seed(1)
    model, adapted = test_convolutions.ready(way.square)
    x = torch.randn(3, 4, 9)
    with tempfile.TemporaryDirectory() as folder:
        wrapped = test_convolutions.theirs(way, model, Path(folder))
    return errors(
        model,
        adapted,
        wrapped,
        way.adapter(),
        lambda: test_convolutions.randomised(adapted, "adapter_bank.made"),
        lambda each: each(x),
    )


def main(methods: Sequence[str]) -> None:
    """Print the matrix."""
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for name, make in MODELS.items():
        model = make()
        adapted = adapt(model)
        for case in CASES:
            if methods and case.method not in methods:
                continue
            row = found.setdefault(case.name, {})
            if name in case.models:
                row[name] = of_case(case, name, model, adapted)
    for label, way in test_convolutions.WAYS.items():
        if not methods or label.split()[0] in methods:
            found.setdefault(label, {})["convolutions"] = of_way(way)
    names = [*MODELS, "convolutions"]
    table = Table("method", *(f"{name} {direction}" for name in names for direction in ("read", "write")))
    for label, row in found.items():
        table.add_row(label, *(error for name in names for error in row.get(name, ("-", "-"))))
    Console(width=160).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
