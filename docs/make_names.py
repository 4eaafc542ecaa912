"""Writes the tables of docs/from-peft.md: every public name of PEFT's, and what it is here. Needs PEFT installed.

    python docs/make_names.py

What differs is said here; what is refused, with the reason, in drop_in/refused.py. A test tells when the page is old.
"""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import peft

from peftc import peft as ours
from peftc.peft.models import PeftModel

PAGE = Path(__file__).parent / "from-peft.md"
BEGIN, END = "<!-- The names: made by docs/make_names.py -->", "<!-- The names end. -->"

DIFFERS = {
    "get_peft_model": "the model that is passed in is not changed; the result is of its class and shares its weights",
    "inject_adapter_in_model": "the model that is passed in is not changed; the result is of its class",
    "prepare_model_for_kbit_training": "returns a model over the same weights, and leaves the one passed in as it is",
    "PeftMixedModel": "the same class as `PeftModel`: adapters of several methods may be active in any model",
    "PeftModel": "an object of the user's class too; no module is wrapped, and `base_model` is transformers' own",
    "get_peft_model_state_dict": "`save_embedding_layers` is an argument of `save_pretrained` alone",
    "get_base_model_state_dict": "without what is merged",
    "set_base_model_state_dict": "refused while adapters are merged; the model that was adapted keeps its values",
    "hotswap_adapter": "takes any method, and other ranks and targets; refused while the adapter is merged",
    "load_peft_weights": "a pickled file is read only with `allow_pickle=True`",
}
METHODS = {
    "add_adapter": "takes a spec as well; in transformers' order, the config first, the new adapter is active",
    "active_adapters": "may also be called, as transformers' method of that name is",
    "delete_adapter": "takes several names too; what was frozen on purpose and is activated instead stays frozen",
    "disable_adapter": "what is merged rests too",
    "from_pretrained": "the `config` that is passed in is not changed; a pickled file needs `allow_pickle=True`",
    "get_base_model": "this very model as an object of the user's class; `unload` gives one without adapters",
    "has_active_enabled_adapter": "false where no adapter is active, too",
    "get_layer_status": "modules without an adapter are not listed",
    "get_model_status": "`active_adapters` is never 'irregular': activation is the model's, not a layer's",
    "load_adapter": "an adapter that lacks something, or has too much, is refused; the first one becomes active",
    "prepare_model_for_gradient_checkpointing": "returns the model as it is: nothing has to be prepared",
    "peft_config": "made from the adapters when asked for: writing to it changes none",
    "save_pretrained": "an argument that nothing would read is refused; `path_initial_model_for_weight_conversion` too",
    "set_adapter": "takes several names, and weights by name; activating by several names mixes them",
}
NO_METHODS = {
    "get_prompt": "virtual tokens are nodes of the graph; `adapter_state_dict` has their tensors",
    "get_prompt_embedding_to_save": "`adapter_state_dict` has what is saved",
    "supports_lora_conversion": "there is no conversion to LoRA",
    "modules_to_save": "`peft_config[name].modules_to_save` has the names",
}


def names() -> Iterator[tuple[str, str]]:
    """Every public name of the package, and what it is here."""
    for name in sorted(peft.__all__, key=str.lower):
        try:
            getattr(ours, name)
        except AttributeError as error:
            yield name, f"refused: {str(error).partition(': ')[2] or error}"
        else:
            yield name, f"differs: {DIFFERS[name]}" if name in DIFFERS else "same"


def methods() -> Iterator[tuple[str, str]]:
    """Every public name of its models, and what it is here."""
    theirs = {name for kind in peft.PeftModel.__mro__ if kind.__module__.startswith("peft") for name in vars(kind)}
    theirs |= {
        "merge_adapter",
        "unmerge_adapter",
        "merge_and_unload",
        "unload",
        "add_weighted_adapter",
    }  # of its tuners
    theirs |= {"enable_adapter_layers", "disable_adapter_layers", "active_adapter"}
    for name in sorted(each for each in theirs if not each.startswith("_")):
        if name == "generate":
            yield name, "same, where the user's class has it"
        elif inspect.getattr_static(PeftModel, name, None) is None:
            yield name, f"refused: {NO_METHODS[name]}"
        else:
            yield name, f"differs: {METHODS[name]}" if name in METHODS else "same"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows that say the same are one."""
    alike: dict[str, list[str]] = {}
    for name, what in rows:
        alike.setdefault(what, []).append(f"`{name}`")
    lines = [f"| {', '.join(found)} | {what} |" for what, found in alike.items()]
    return "\n".join(["| name | here |", "|---|---|", *lines])


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    made = f"## Names of the package\n\n{table(names())}\n\n## Names of a model\n\n{table(methods())}"
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
