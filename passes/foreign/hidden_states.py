"""transformers' names for a pass that is made for what a model's layers give, and for how many tokens a call has."""

from collections.abc import Collection, Mapping
from typing import Any

from peftc.passes.foreign.transformers import EMBEDDINGS_OUT, LABELS, LOGITS_TO_KEEP, TOKENS, USE_CACHE

HIDDEN_STATES = "hidden_states"
ASKS_FOR_HIDDEN = "output_hidden_states"
_EMBEDDINGS = "inputs_embeds"


def head_of(model: Any) -> Any | None:
    """The module that gives the logits, if the model tells."""
    find = getattr(model, EMBEDDINGS_OUT, None)
    return None if find is None else find()


def hidden_pass(arguments: Mapping[str, Any], known: Collection[str], *, whole: bool) -> dict[str, Any]:
    """The arguments of a call that is made for the hidden states; `known` are the names that calls have.

    Unless it is the `whole` model that is to run, there are as few logits as can be.
    """
    asked = {name: value for name, value in arguments.items() if name not in (LABELS, LOGITS_TO_KEEP)}
    asked |= {ASKS_FOR_HIDDEN: True, "return_dict": True}
    for name, value in ((USE_CACHE, False), (LOGITS_TO_KEEP, 0 if whole else 1)):
        if name in known:
            asked[name] = value
    return asked


def last_hidden_state(output: Any) -> Any | None:
    """What the last layer gave, `[rows, tokens, hidden]`; None where an output does not tell."""
    found = getattr(output, HIDDEN_STATES, None)
    return found[-1] if found else None


def tokens_in(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many rows and tokens a call has: of its ids, its embeddings, or else of the first tensor that has features.

    None where it has none of these.
    """
    given = [arguments.get(name) for name in (TOKENS, _EMBEDDINGS)]
    given += [each for each in arguments.values() if len(getattr(each, "shape", ())) == 3]
    found = next((each for each in given if each is not None), None)
    return None if found is None else (int(found.shape[0]), int(found.shape[1]))
