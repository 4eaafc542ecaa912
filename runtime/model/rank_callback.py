"""The budget of adapters in transformers' Trainer."""

import warnings
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.model.allocating import allocating
from peftc.runtime.model.model import AdaptedModel


class RankAllocation(TrainerCallback):  # type: ignore[misc] # transformers is untyped
    """Calls `update_and_allocate` at every step of a Trainer: `Trainer(..., callbacks=[RankAllocation()])`.

    Where the schedule has no final steps, the last masks are made when training ends, so that the budget is kept.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Raise UsageError unless there is a budget to keep; warn if its schedule is not this training's."""
        for adapter in _adapters(model):
            assert adapter.allocator is not None
            steps, name = adapter.allocator.schedule.steps, adapter.plan.name
            if steps <= 0:
                message = f"adapter {name!r} does not say over how many steps its budget falls"
                fail(UsageError, "E547", message, help=f"this training has {state.max_steps}")
            if steps != state.max_steps:
                message = f"the budget of adapter {name!r} falls over {steps} steps, and training has {state.max_steps}"
                warnings.warn(message, stacklevel=2)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Between `optimizer.step()` and `zero_grad()`."""
        _adapted(model).update_and_allocate(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Make the final masks if the schedule ends with the training, before anything is saved."""
        if state.global_step >= state.max_steps:
            for adapter in _adapters(model):
                assert adapter.allocator is not None
                if adapter.allocator.last == state.global_step:
                    adapter.allocator.update(adapter.tensor, state.global_step)


def _adapted(model: Any) -> AdaptedModel:
    found = getattr(model, "_orig_mod", model)  # torch.compile wraps
    if not isinstance(found, AdaptedModel):
        message = f"the Trainer's model is a {type(found).__name__}, not an adapted model"
        fail(UsageError, "E546", message, help="give it what compiler.apply returns")
    return found


def _adapters(model: Any) -> list[AdapterParameters]:
    return allocating(_adapted(model)._adapter_state)
