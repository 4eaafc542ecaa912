"""What modules are given while a model runs on some batches: the mean and covariance of their inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.method.initialisers import MEASURED
from peftc.grammar.method.rule import Init
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plan import AdapterPlan, PlannedSite
from peftc.runtime.base.share import placement

Batches = Iterable[Mapping[str, Any] | Sequence[Any] | torch.Tensor]

_PLAIN = ("linear", "conv1d")  # kinds whose module is given rows of numbers
_HELP = "pass calibration=batches to apply or add_adapter: an iterable of what the model is called with"


@dataclass
class Moments:
    """Of rows of numbers: how many there are, their mean, and the sum of the squares around it."""

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> "Moments":
        """Those of a matrix's rows."""
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def add(self, other: "Moments") -> None:
        """Take in more rows, without the loss that a difference of large sums would have (Chan et al. 1982)."""
        total = self.count + other.count
        apart = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(apart, apart, alpha=self.count * other.count / total)
        self.mean += apart * (other.count / total)
        self.count = total

    def value(self, function: str) -> torch.Tensor:
        """The covariance, or the second moment, which is around zero."""
        covariance = self.scatter / self.count
        return covariance if function == "covariance" else covariance.addr_(self.mean, self.mean)


def measured(
    base: Callable[[], nn.Module], plans: Sequence[AdapterPlan], batches: Batches | None
) -> dict[str, Moments]:
    """The moments of the inputs of every module whose adapter starts from them.

    `base` makes a copy of the base model, which runs on the batches in evaluation mode. Where a batch has an
    `attention_mask`, the places it leaves out are not counted. Raises UsageError (E55x).
    """
    sites = {at.site.module: (plan, at) for plan in plans for at in plan.sites if _is_measured(at)}
    if not sites:
        return {}
    for plan, at in sites.values():
        if at.site.kind not in _PLAIN:
            message = f"'{plan.spec.rule.name}' starts from the inputs of a module, and '{at.site.name}' of kind "
            fail(UsageError, "E555", f"{message}'{at.site.kind}' is not given rows of numbers", plan.spec.span)
    if batches is None:
        plan = next(iter(sites.values()))[0]
        message = f"'{plan.spec.rule.name}' starts from the inputs of its sites, and there is no calibration"
        fail(UsageError, "E554", message, plan.spec.span, _HELP)
    if isinstance(batches, Mapping | torch.Tensor) or not isinstance(batches, Iterable):
        message = f"calibration is an iterable of batches, not a {type(batches).__name__}"
        fail(UsageError, "E556", message, help="put a single batch into a list")
    found = _run(base().eval(), sites, batches)
    for name, (plan, _) in sites.items():
        if name not in found:
            message = f"no calibration batch reached '{name}'"
            fail(UsageError, "E557", message, plan.spec.span, "skip the site, or calibrate with what makes use of it")
    return found


def imagined(plan: AdapterPlan) -> dict[str, Moments]:
    """Moments of nothing, where only the sizes matter."""
    sites = [at.site for at in plan.sites if _is_measured(at)]
    sizes = {each.module: each.in_features for each in sites}
    return {name: Moments(1, torch.zeros(size), torch.zeros(size, size)) for name, size in sizes.items()}


def _is_measured(at: PlannedSite) -> bool:
    made = {each.role for each in at.bound.params}
    needed = made | at.bound.sources(made)
    starts = [each.init for each in at.bound.starts if each.role in needed]
    return any(isinstance(each, Init) and each.function in MEASURED for each in starts)


@torch.no_grad()
def _run(model: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    counted: list[torch.Tensor] = []  # the mask of the batch that runs

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = next(iter((*args, *kwargs.values()))).detach()
            rows = rows if rows.dtype == torch.float64 else rows.float()
            for mask in counted:
                if mask.shape == rows.shape[:-1]:
                    rows = rows[mask.to(rows.device, torch.bool)]
            rows = rows.reshape(-1, rows.shape[-1])
            if len(rows) and name in found:
                found[name].add(Moments.of(rows))
            elif len(rows):
                found[name] = Moments.of(rows)

        return look

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
    device, empty = placement(model)[0], True
    for batch in batches:
        empty = False
        args, kwargs = _call(batch, device)
        mask = kwargs.get(contract.MASK)
        counted[:] = [mask] if isinstance(mask, torch.Tensor) else []
        model(*args, **kwargs)
    if empty:
        fail(UsageError, "E556", "there are no batches to calibrate with", help=_HELP)
    return found


def _call(
    batch: Mapping[str, Any] | Sequence[Any] | torch.Tensor, device: torch.device | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def moved(values: Iterable[Any]) -> Iterator[Any]:
        return (each.to(device) if isinstance(each, torch.Tensor) else each for each in values)

    if isinstance(batch, Mapping):
        return (), dict(zip(batch, moved(batch.values()), strict=True))
    return tuple(moved([batch] if isinstance(batch, torch.Tensor) else batch)), {}
