"""Token embeddings and heads that a file holds beside its adapter: those of a base whose vocabulary had grown."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.passes.plan.plan import AdapterPlan, PlannedCopy
from peftc.passes.plan.resolve import ModelSurvey
from peftc.passes.plan.vocabulary import vocabulary
from peftc.runtime.peft_format.same_base import is_same, narrowed
from peftc.runtime.peft_format.wrapped_names import base_name

_SHOWN = 8


@dataclass(frozen=True)
class OwnEmbeddings:
    """What a file has in place of the base's embeddings: tensors by their names in the model, each with its ties.

    `size` is how many tokens they are for. `rows` are those that differ though others behind them do not, by name.
    """

    tensors: Mapping[str, Tensor]
    ties: Mapping[str, tuple[str, ...]]
    parted: frozenset[str]
    size: int
    rows: Mapping[str, tuple[int, ...]]

    def beside(self, plan: AdapterPlan) -> AdapterPlan:
        """The plan of the adapter that has these too."""
        copies = []
        for name, tensor in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            others = tuple((leaf, each) for each in self.ties[name] if each != name)
            read = tuple(each for each in (name, *(full for _, full in others)) if each in self.tensors)
            if name == next(each for each in self.tensors if each in self.ties[name]):  # one copy serves what is tied
                shape = tuple(tensor.shape)
                parted = name in self.parted
                copies.append(PlannedCopy(module, ((leaf, shape, False),), tied=others, parted=parted, read=read))
        return replace(plan, copies=(*plan.copies, *copies))

    @property
    def message(self) -> str:
        """What to tell of single rows that differ; empty where there are none."""
        parts = []
        for name, rows in self.rows.items():
            more = ", ..." if len(rows) > _SHOWN else ""
            parts.append(f"the tokens {', '.join(map(str, rows[:_SHOWN]))}{more} of '{name}'")
        return f"the file has {' and '.join(parts)} otherwise than the model: its own are used" if parts else ""


def embedding_modules(ground: ModelSurvey) -> tuple[str, ...]:
    """The modules that embed tokens and turn hidden states into logits, as far as the model says so."""
    return tuple(each for each in dict.fromkeys((ground.embedding, ground.head)) if each)


def own_embeddings(
    plan: AdapterPlan, ground: ModelSurvey, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], where: str
) -> OwnEmbeddings | None:
    """The embeddings of a file that are not the model's, if they are those of the same base with other tokens.

    None where all are the model's, or where they are so different that the base is another one: then they are none of
    the adapter's, and `fit` says so.

    Args:
        plan: The adapter, planned on the model as it is. What it trains as a whole is not looked at.
        ground: The model.
        tensors: The file's tensors by key.
        base: The model's own tensors by name.
        where: What messages call the file.

    Raises:
        CheckpointError: what is one tensor in the model has two values in the file, or the model would need rows of
            its output head that the file has not.
    """
    taken = {full for copy in plan.copies for name, _, _ in copy.tensors for full in copy.names(name)}
    modules = embedding_modules(ground)
    names = {each for each in base if each.rpartition(".")[0] in modules and each not in taken}
    found = {name: each for key, each in tensors.items() if (name := base_name(key, names)) is not None}
    found = {name: found[name] for name in base if name in found}  # in the model's order
    if all(is_same(each, base[name]) for name, each in found.items()):
        return None
    known = vocabulary(ground)
    if known is None and any(each.shape != base[name].shape for name, each in found.items()):
        return None
    if not all(is_same(each, base[name]) or _is_like(each, base[name]) for name, each in found.items()):
        return None
    ties = {name: tuple(each for each in ground.ties.get(name, (name,)) if each not in taken) for name in found}
    _check_ties(found, ties, where)
    size = max(len(each) for each in found.values())
    lacking = [name for name, each in found.items() if len(each) < size]
    if known is not None and size > known.size and known.head and f"{known.head}.weight" not in {*found, *taken}:
        lacking.append(f"{known.head}.weight")
    if lacking:
        help = f"resize the model as it was in training: model.resize_token_embeddings({size})"
        message = f"the file has embeddings of {size} tokens, and no rows of {lacking[0]} for so many"
        fail(CheckpointError, "E363", message, help=help, where=where)
    # What is the model's is left to it: then a model that is merged or exported has no second copy of it.
    kept = {name: each for name, each in found.items() if not is_same(each, base[name])}
    parted = frozenset(name for name in kept if len(ties[name]) < len(ground.ties.get(name, (name,))))
    rows: dict[str, tuple[int, ...]] = {}
    for name, each in kept.items():
        if rows.keys().isdisjoint(ties[name]) and (single := _single_rows(each, base[name])):
            rows[name] = single
    return OwnEmbeddings(kept, ties, parted, size, rows)


def _check_ties(found: Mapping[str, Tensor], ties: Mapping[str, Collection[str]], where: str) -> None:
    for name, each in found.items():
        for other in ties[name]:
            if other in found and not torch.equal(found[other], each):
                message = f"the file holds its own '{name}' and another '{other}', which are one tensor in the model"
                help = "load the model it was trained on, whose output head has a weight of its own"
                fail(CheckpointError, "E343", message, help=help, where=where)


def _is_like(own: Tensor, base: Tensor) -> bool:
    """Whether these are the embeddings of the same base, with other rows for some tokens or with more tokens.

    No other base has a row with the very same numbers, zeros apart, which stand for padding everywhere. The rows that
    differ are the last ones, those of new tokens, or the fewer: a few tokens were put in the place of reserved ones. A
    base that was trained further has its most used rows changed, which are neither.
    """
    if own.shape[1:] != base.shape[1:] or len(own) < len(base):
        return False
    if own.dim() < 2 or base.is_meta:  # biases are what the weight beside them is; of what is not here nothing is known
        return True
    same, counts = _rows(own, base)
    equal, other = int((same & counts).sum()), int((~same).sum())
    return equal > 0 and (equal >= other or not _single_rows(own, base))


def _single_rows(own: Tensor, base: Tensor) -> tuple[int, ...]:
    """The rows that differ where one behind them does not."""
    if own.dim() < 2 or base.is_meta:
        return ()
    same, counts = _rows(own, base)
    last = (same & counts).nonzero().flatten()
    behind = int(last[-1]) if len(last) else 0
    return tuple((~same[:behind]).nonzero().flatten().tolist())


def _rows(own: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows that both have, which are the same, and which say anything."""
    count = min(len(own), len(base))
    theirs, ours = (each.flatten(1) for each in narrowed(own[:count], base[:count]))
    return (ours == theirs).all(1), (theirs != 0).any(1)
