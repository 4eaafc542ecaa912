"""What a model's weights were called in earlier releases of transformers, as transformers itself says it."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from peftc.passes.foreign.conversions import EXPERT, converters, own_renamings, renamings, stacked
from peftc.passes.plan.earlier import Slot, Today


class EarlierNames:
    """Today's names of a model's tensors, by those of earlier releases. The model is looked at when one is asked."""

    def __init__(self, model: nn.Module):
        self._model = model

    def __call__(self, tensor: str) -> Today:
        """Where a tensor of this earlier name is now; under the same name, where nothing is known of it."""
        name = tensor
        for pattern, replacement in self._own.items():
            name, count = re.subn(pattern, re.sub(r"\(\?.*\)", "", replacement.lstrip("^")), name)
            if count:
                break
        name, _ = rename_source_key(name, renamings(self._conversions), [])
        for converter in converters(self._conversions):
            today, pattern = rename_source_key(name, [], [converter])
            if pattern is not None:
                return self._stacked(tensor, name, today, pattern, stacked(converter))
        return Today(name)

    @cached_property
    def _conversions(self) -> list[Any]:
        return get_model_conversion_mapping(self._model) if isinstance(self._model, PreTrainedModel) else []

    @cached_property
    def _own(self) -> dict[str, str]:
        return own_renamings(self._model)

    def _stacked(self, tensor: str, name: str, today: str, pattern: str, patterns: Sequence[str]) -> Today:
        """The part of a stack that a weight is, if that is what it is."""
        found = re.search(pattern.replace(EXPERT, r"(?P<expert>\d+)\.", 1) + "$", name) if pattern in patterns else None
        if found is None:
            return Today(today)
        # The number and what follows it are in the earlier name as they are here, but for a name behind the number.
        behind = [re.sub(r"\\(.)", r"\1", each.partition(EXPERT)[2]) for each in patterns]
        part = patterns.index(pattern)
        end = f"{found['expert']}.{behind[part]}"
        slot = Slot(today, int(found["expert"]), part, len(patterns))
        if not tensor.endswith(f".{end}"):
            return Today(today, slot)
        start = tensor.removesuffix(end)
        return Today(today, slot, lambda expert, other: f"{start}{expert}.{behind[other]}")
