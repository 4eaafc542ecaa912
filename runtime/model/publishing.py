"""What goes beside saved adapters, and up to the Hub with them: a model card."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from peftc.grammar.spec.values import complete
from peftc.passes.foreign import peft as contract
from peftc.passes.plan.plan import AdapterPlan
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.base.overlay import is_adapters
from peftc.runtime.model.saving import saved_name, versions
from peftc.runtime.peft_format.adapter_files import write_files
from peftc.runtime.peft_format.model_card import FILE, OURS, PEFT, CardAdapter, CardFacts, updated_card


def write_card(
    model: AdaptedModule,
    directory: Path,
    names: Sequence[str],
    *,
    metrics: Mapping[str, object] | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write README.md, or bring the metadata of the one there is up to date: see `create_or_update_model_card`."""
    path = directory / FILE
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        card = updated_card(text, _facts(model, names, metrics or {}, tags))
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{path} has metadata that cannot be read, so it was left as it is: {reason}", stacklevel=4)
        return
    write_files(directory, {FILE: lambda to: to.write_text(card, encoding="utf-8")})


def _facts(model: AdaptedModule, names: Sequence[str], metrics: Mapping[str, object], tags: Sequence[str]) -> CardFacts:
    state = model._adapter_state
    plans = [state.adapter(name).plan for name in names]
    classes = [each.__name__ for each in type(model).__mro__]
    own = getattr(model, "model_tags", None) or ()
    return CardFacts(
        base_model=state.base.facts.base_name,
        base_class=type(model).__name__,
        task=state.base.facts.task_type or contract.task_of(classes),
        adapters=[_adapter(plan) for plan in plans],
        library=PEFT if all(plan.spec.rule.peft_type for plan in plans) else OURS,
        versions=versions(),
        tags=[*(["transformers"] if hasattr(model, "config") else []), *own, *tags],
        quantized=state.base.own().quantization(),
        metrics=metrics,
        saved_as=saved_name(model, names[0]) if names else "default",
    )


def _adapter(plan: AdapterPlan) -> CardAdapter:
    spec = plan.spec
    usual = dict(complete(spec.rule, ()))
    said = {name: value for name, value in spec.values if name in ("rank", "alpha") or usual.get(name) != value}
    adapted = [at.site.module for at in plan.sites]
    adapted += [each.module for each in plan.copies] + [each.module for each in plan.rows]
    places = dict.fromkeys(name.rpartition(".")[2] for name in adapted if name and not is_adapters(name))
    kinds = [spec.rule.peft_type.lower()] if spec.rule.peft_type else []
    return CardAdapter(plan.name, spec.rule.name, said, list(places), plan.parameter_count, kinds)


@dataclass(frozen=True)
class PushOptions:
    """Where to, and how it is told: the arguments of `push_to_hub` in transformers."""

    repo_id: str
    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: bool | str | None = None
    revision: str | None = None
    create_pr: bool = False
    tags: Sequence[str] = ()


def push(model: Any, options: PushOptions, **saved: Any) -> CommitInfo:
    """Save into a directory of its own, and upload that. `saved` are arguments of `save_pretrained`."""
    api = HfApi(token=options.token)
    found = api.create_repo(options.repo_id, private=options.private, exist_ok=True)
    if options.revision is not None and not options.revision.startswith("refs/pr"):
        api.create_branch(found.repo_id, branch=options.revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, **saved)
        if options.tags:
            model.create_or_update_model_card(directory, tags=options.tags)
        return api.upload_folder(
            repo_id=found.repo_id,
            folder_path=Path(directory),
            commit_message=options.commit_message or "Upload adapter",
            commit_description=options.commit_description,
            revision=options.revision,
            create_pr=options.create_pr,
        )
