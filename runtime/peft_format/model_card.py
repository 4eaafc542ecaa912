"""README.md of a saved adapter: a model card, as the Hub shows it, with the metadata that libraries look for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

FILE = "README.md"
PEFT, OURS = "peft", "peftc"
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


@dataclass(frozen=True)
class CardAdapter:
    """What a card says of one adapter."""

    name: str
    method: str
    values: Mapping[str, object]
    places: Sequence[str]  # the ends of the names of what is adapted
    parameters: int
    kinds: Sequence[str] = ()  # what the method is a kind of: the Hub runs what is tagged `lora`


@dataclass(frozen=True)
class CardFacts:
    """What a card says of the saved adapters and their base."""

    base_model: str | None
    base_class: str
    task: str | None
    adapters: Sequence[CardAdapter]
    library: str  # what loads the files
    versions: Mapping[str, str]
    tags: Sequence[str] = ()
    quantized: str | None = None
    metrics: Mapping[str, object] = field(default_factory=dict)
    saved_as: str = "default"  # the name of the first, which lies in a directory called so, if it is not this one


def updated_card(text: str | None, facts: CardFacts) -> str:
    """The card, made anew where there is none (`text` None); else the metadata of the one there is, brought up to date.

    What its author wrote stays as it is. Raises ValueError where the metadata cannot be read.
    """
    card = ModelCard(_fresh(facts) if text is None else text, ignore_metadata_errors=False)
    known: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    card.data["library_name"] = facts.library
    if facts.base_model:
        card.data["base_model"] = facts.base_model
    card.data["tags"] = sorted({*(known.get("tags") or ()), *facts.tags, *_tags(facts)})
    if facts.task in _PIPELINES and not known.get("pipeline_tag"):
        card.data["pipeline_tag"] = _PIPELINES[facts.task]
    return str(card)


def _tags(facts: CardFacts) -> list[str]:
    base = [f"base_model:adapter:{facts.base_model}"] if facts.base_model else []
    return [*base, *(tag for each in facts.adapters for tag in (each.method, *each.kinds)), OURS]


def _fresh(facts: CardFacts) -> str:
    heading = facts.base_model or facts.base_class
    lines = [f"# Adapter{'s' * (len(facts.adapters) > 1)} for {heading}", ""]
    lines += ["| adapter | method | adapts | trained numbers |", "|---|---|---|---:|"]
    for each in facts.adapters:
        said = ", ".join(f"{name} = {value}" for name, value in each.values.items())
        method = f"{each.method} ({said})" if said else each.method
        places = ", ".join(each.places) or "what stands in front"
        lines.append(f"| {each.name} | {method} | {places} | {each.parameters:,} |")
    if facts.quantized:
        lines += ["", f"The base was quantized while it was trained: {facts.quantized}."]
    if facts.metrics:
        lines += ["", "## Results", "", *(f"- {name}: {value}" for name, value in facts.metrics.items())]
    lines += ["", "## Use", "", "```python", *_loading(facts), "```"]
    lines += ["", "### Framework versions", "", *(f"- {name} {value}" for name, value in facts.versions.items()), ""]
    return f"---\n{ModelCardData().to_yaml()}\n---\n\n" + "\n".join(lines)


def _loading(facts: CardFacts) -> list[str]:
    base = f"base = {facts.base_class}.from_pretrained({facts.base_model or '...'!r})"
    where = "" if facts.saved_as == "default" else f', subfolder="{facts.saved_as}"'
    if facts.library == PEFT:
        return ["from peft import PeftModel", "", base, f'model = PeftModel.from_pretrained(base, "..."{where})']
    return ["from peftc import compiler", "", base, f'model = compiler.load(base, "..."{where})']
