"""The tokenizer that belongs to a model, for specs that name tokens by their text."""

from typing import Any

from transformers import AutoTokenizer

from peftc.compiler.models import FoundModel
from peftc.grammar.diagnostics import Diagnostic, SpecError
from peftc.grammar.spec import Spec
from peftc.runtime.tokens import has_texts


def tokenizer_for(spec: Spec, found: FoundModel) -> Any | None:
    """The model's tokenizer if the spec needs one.

    Raises:
        SpecError: the spec names tokens by their text, and none can be loaded from where the model is.
    """
    needing = [each for each in spec.adapters if has_texts(each)]
    if not needing or found.tokenizer is not None:
        return found.tokenizer
    known = found.name if found.origin in ("weights", "random", "hub") else ""
    name = known or getattr(found.model, "name_or_path", "")
    span = next(each.span for each in needing[0].tokens if any(isinstance(token, str) for token in each.tokens))
    help = "put the tokenizer's files beside the model's, or write ids"
    if not name:
        message = "tokens are named by their text, and it is not known where the model's tokenizer is"
        raise SpecError(Diagnostic("E227", message, span, help))
    try:
        return AutoTokenizer.from_pretrained(name, **found.loading)
    except Exception as error:  # a directory without one makes it raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"tokens are named by their text, and no tokenizer can be loaded from {name}"
        raise SpecError(Diagnostic("E227", message, span, f"{help}\n{first[:200]}")) from error
