"""Tokens of a spec as ids: what a tokenizer knows of them, and tokens that a model has not yet."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer

from peftc.grammar.diagnostics import CheckpointError, Diagnostic, SpecError, UsageError, did_you_mean, fail
from peftc.grammar.source import Span
from peftc.grammar.spec.spec import AdapterSpec
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.vocabulary import Vocabulary

_MARKS = ("\u0120", "\u2581")  # how tokenizers write a space in front of a word


def has_texts(spec: AdapterSpec) -> bool:
    """Whether the spec names tokens by their text."""
    return any(isinstance(token, str) for each in spec.tokens for token in each.tokens)


def with_ids(spec: AdapterSpec, tokenizer: Any | None) -> AdapterSpec:
    """The spec with ids for the texts of tokens.

    Raises:
        SpecError: there is no tokenizer, or a text is not exactly one token of its vocabulary.
    """
    if not has_texts(spec):
        return spec
    problems: list[Diagnostic] = []
    clauses = []
    for clause in spec.tokens:
        ids: list[str | int] = []
        for token in clause.tokens:
            if isinstance(token, int):
                ids.append(token)
                continue
            try:
                ids.append(_id(token, tokenizer, clause.span))
            except SpecError as error:
                problems += error.diagnostics
        clauses.append(replace(clause, tokens=tuple(ids)))
    if problems:
        raise SpecError(*problems)
    return replace(spec, tokens=tuple(clauses))


def text_ids(text: str, name: str, tokenizer: Any | None, size: int, **options: Any) -> list[int]:
    """The ids of a text's tokens, special tokens included: by the tokenizer (with these options of its own), or else
    the one of that name.

    Raises:
        UsageError: there is no tokenizer, the text has no tokens, or one is beyond the model's `size` tokens.
    """
    if tokenizer is None:
        tokenizer = _loaded(name)
    if not callable(tokenizer):
        message = f"a value of type {type(tokenizer).__name__} is not a tokenizer"
        fail(UsageError, "E565", message, help="pass one of transformers, such as AutoTokenizer.from_pretrained(...)")
    return _of_model(tokenizer(text, **options)[contract.TOKENS], text, size)


def chat_ids(text: str, tokenizer: Any, size: int) -> list[int] | None:
    """The ids of a text as a system message; None where the tokenizer has no template for chats.

    Raises:
        UsageError: the template takes no system message, or a token is beyond the model's `size` tokens.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        return None
    messages = [{"role": "system", "content": text}]
    try:
        found = tokenizer.apply_chat_template(messages, **contract.CHAT_AS_IDS)
    except (TypeError, ValueError):
        return None
    except Exception as error:  # templates raise what they like
        message = f"the tokenizer's template takes no system message: {error}"
        fail(UsageError, "E566", message, help="pass use_chat_template=False")
    return _of_model(found, text, size)


def _of_model(found: Any, text: str, size: int) -> list[int]:
    """Ids as plain numbers, checked."""
    ids = [int(each) for each in found]
    if not ids:
        fail(UsageError, "E566", f"the text {text!r} has no tokens", help="give a text to start from")
    if max(ids) >= size:
        message = f"the text {text!r} has the token {max(ids)}, and the model knows {size}"
        fail(UsageError, "E566", message, help="use the model's own tokenizer, or resize its embeddings first")
    return ids


def imagined(text: str) -> dict[str, list[int]]:
    """What stands for a tokenizer where the numbers do not matter."""
    return {contract.TOKENS: [0]}


def _loaded(name: str) -> Any:
    if not name:
        message = "the adapter starts from the tokens of a text, and there is no tokenizer"
        fail(UsageError, "E565", message, help="pass tokenizer=..., or name one in the spec")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        help = f"{reason}\npass tokenizer=..., or name a directory with one"
        fail(UsageError, "E565", f"the tokenizer {name!r} cannot be loaded", help=help)


def size_of(tokenizer: Any | None) -> int | None:
    """How many tokens a tokenizer has; None for what is none."""
    if tokenizer is None or not hasattr(tokenizer, "convert_tokens_to_ids"):
        return None
    return len(tokenizer)


def warn_unchosen(spec: AdapterSpec, vocabulary: Vocabulary, size: int) -> None:
    """Tell of new tokens that the adapter leaves as they are made: they are in no checkpoint."""
    unchosen = sorted({*range(vocabulary.size, size)} - vocabulary.beyond(spec))
    if unchosen:
        shown = ", ".join(map(str, unchosen[:8])) + (", ..." if len(unchosen) > 8 else "")
        message = f"the tokens {shown} are new to the model, and no 'tokens' clause names them"
        warnings.warn(f"{message}: they keep random embeddings, and are not saved", stacklevel=4)


def needed_vocabulary(plan: AdapterPlan, vocabulary: Vocabulary | None, where: str) -> int | None:
    """The size that a checkpoint's tokens ask for, where that is more than the model's.

    Raises:
        CheckpointError: the file has no rows for some of the tokens that the model has not.
    """
    beyond = set() if vocabulary is None else vocabulary.beyond(plan.spec)
    if vocabulary is None or not beyond:
        return None
    size = max(beyond) + 1
    help = f"resize the model as it was in training: model.resize_token_embeddings({size})"
    trained = {module: set(rows.ids) for rows in plan.rows for module in rows.modules}
    missing = (size - vocabulary.size) - len(beyond)  # a file may name any number, so nothing is counted up to it
    if missing:
        first = next(each for each in range(vocabulary.size, size) if each not in beyond)
        shown = f"{first} and {missing - 1} more" if missing > 1 else str(first)
        message = f"the file has rows for tokens up to {size - 1}, but not for {shown} that the model has not"
        fail(CheckpointError, "E362", message, help=help, where=where)
    if vocabulary.head and not beyond <= trained.get(vocabulary.head, set()):
        message = f"the model has {vocabulary.size} tokens, and the file has no rows of {vocabulary.head} for more"
        fail(CheckpointError, "E363", message, help=help, where=where)
    return size


def _id(token: str, tokenizer: Any | None, span: Span | None) -> int:
    if tokenizer is None:
        help = "pass tokenizer=..., the one the model is used with, or write ids"
        fail(SpecError, "E227", f"the token {token!r} needs a tokenizer", span, help)
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        message = f"a value of type {type(tokenizer).__name__} is not a tokenizer"
        fail(SpecError, "E227", message, span, "pass one of transformers, such as AutoTokenizer.from_pretrained(...)")
    found = _known(token, tokenizer)
    if found is not None:
        return found
    added = {*getattr(tokenizer, "get_added_vocab", dict)(), *getattr(tokenizer, "all_special_tokens", ())}
    marked = [mark + token for mark in _MARKS if _known(mark + token, tokenizer) is not None]
    near = f"did you mean {marked[0]!r}, with the space in front?" if marked else did_you_mean(token, added)
    help = f"add it to the tokenizer first: tokenizer.add_tokens([{token!r}])"
    message = f"{token!r} is not one token of the vocabulary"
    fail(SpecError, "E228", message, span, f"{near}\n{help}" if near else help)


def _known(token: str, tokenizer: Any) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    unknown = found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token)
    return None if unknown else int(found)


def check_ties(plan: AdapterPlan, names: Mapping[str, tuple[str, ...]], where: str) -> None:
    """Refuse what PEFT's `ensure_weight_tying` would share and is not.

    Raises:
        CheckpointError: the adapter adapts, or has other rows of, one of several modules with the same weight.
    """
    held = [at.site.weight for at in plan.sites if at.site.tied]
    held += [f"{rows.module}.weight" for rows in plan.rows if not rows.tied]
    for name in held:
        if len(names.get(name, ())) > 1:
            message = f"field 'ensure_weight_tying' = true is not supported for {name}, which is tied"
            fail(CheckpointError, "E364", message, where=where)
