"""drift: what merging the adapters of a checkpoint or a spec into a model would cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from peftc.compiler.api import AdaptedModel, apply, load
from peftc.compiler.load_model.models import FoundModel, seeded
from peftc.compiler.load_model.quantizing import is_packed
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.compiler.trace.example_inputs import drawn_inputs
from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.elaborate import names_file, read_spec
from peftc.grammar.spec.spec import Spec
from peftc.runtime.merge.drift import MergeDrift
from peftc.runtime.merge.repack import Quantized


def drift(
    adapters: Spec | str | PathLike[str],
    model: FoundModel,
    *,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    use: str | PathLike[str] | None = None,
    quantized: Quantized | None = None,
) -> MergeDrift:
    """Measure what merging would cost: `AdaptedModel.merge_drift` for adapters on disk.

    Args:
        adapters: A checkpoint's directory or Hub id, or a spec (a path to an `.adapter` file or a Spec), whose adapters
            are fresh: most methods begin with W' = W, which loses nothing.
        model: From `find_model`. Its example inputs are what is called; without some, tokens drawn from the seed.
        seed: For those tokens, and the initial values of a spec's adapters.
        dtype: Convert the base to this type first (`bfloat16`, or torch's own), as it would be served.
        use: An `.adapter` file with methods of your own, for a checkpoint.
        quantized: Of a quantized base, what becomes of the weights, as in `merge_drift`.

    Returns:
        The drift; without outputs for a model of which nothing is known that it could be called with.

    Raises:
        AdapterError: the spec, the checkpoint or the model is wrong, or `quantized` is not said and needed.
    """
    if dtype is not None:
        if is_packed(model.model):
            message = f"{model.name} is quantized, so its type cannot be changed"
            fail(UsageError, "E590", message, help="convert the model that it is quantized from", where=model.name)
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = replace(model, model=model.model.to(wanted))
    with seeded(seed):
        adapted = adapted_by(adapters, model, use)
        args, kwargs = _arguments(model)
        return adapted.merge_drift(*args, **kwargs, quantized=quantized)


def adapted_by(
    adapters: Spec | str | PathLike[str], model: FoundModel, use: str | PathLike[str] | None
) -> AdaptedModel:
    """The model with the adapters of a checkpoint, or fresh ones of a spec."""
    if not isinstance(adapters, Spec) and not names_file(str(adapters)):
        return load(model.model, adapters, use=use)
    meant = adapters if isinstance(adapters, Spec) else read_spec(Path(adapters))
    return apply(model.model, meant, tokenizer=tokenizer_for(meant, model), dense=model.dense)


def _arguments(found: FoundModel) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Of a call of the model: its own example inputs, or random tokens for whatever takes tokens."""
    given = found.example_inputs
    if isinstance(given, torch.Tensor):
        return (given,), {}
    if given is not None:
        return ((), given) if isinstance(given, Mapping) else (given, {})
    return (), drawn_inputs(found.model)
