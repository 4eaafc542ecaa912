"""The tokenizer that belongs to a model: for specs that name tokens by their text, and beside what is exported."""

from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import AutoTokenizer

from peftc.compiler.load_model.models import FoundModel
from peftc.compiler.load_model.pretrained import hub_is_known, quiet_transformers
from peftc.grammar.diagnostics import Diagnostic, SpecError
from peftc.grammar.spec.spec import Spec
from peftc.runtime.init.tokens import has_texts

# Where its files are not, a tokenizer's class makes one without any tokens. These are looked for, and those it names.
_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")


def tokenizer_for(spec: Spec, found: FoundModel) -> Any | None:
    """The model's tokenizer if the spec needs one.

    Raises:
        SpecError: the spec names tokens by their text, and none can be loaded from where the model is.
    """
    needing = [each for each in spec.adapters if has_texts(each)]
    if not needing or found.tokenizer is not None:
        return found.tokenizer
    name = _place(found)
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


def tokenizer_beside(found: FoundModel) -> Any | None:
    """The model's tokenizer, if there is one where the model is from."""
    name = _place(found)
    if found.tokenizer is not None or not name:
        return found.tokenizer
    options = dict(found.loading)
    options["local_files_only"] = options.get("local_files_only") or not hub_is_known()
    try:
        with quiet_transformers():
            made: Any = AutoTokenizer.from_pretrained(name, **options)
    except Exception:  # a directory without one makes it raise anything
        return None
    files = {*_FILES, *getattr(made, "vocab_files_names", {}).values()}
    return made if any(_is_there(name, each, options.get("revision")) for each in files) else None


def _place(found: FoundModel) -> str:
    """The directory or repository that a model is from, if it is known."""
    known = found.name if found.origin in ("weights", "random", "hub") else ""
    return known or str(getattr(found.model, "name_or_path", ""))


def _is_there(name: str, file: str, revision: str | None) -> bool:
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    return isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str)
