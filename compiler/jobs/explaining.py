"""explain: how each site of a spec would be lowered, and what the alternatives would cost."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.compiler.api import adapt
from peftc.compiler.jobs.drawing import as_found
from peftc.compiler.jobs.refusing import Refused, refusals
from peftc.compiler.load_model.models import FoundModel
from peftc.compiler.load_model.quantizing import quantized_copy
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.compiler.report.facts import (
    CallFacts,
    CostFacts,
    ExplainFacts,
    GroupFacts,
    TermFacts,
    TogetherFacts,
)
from peftc.compiler.report.inserted import inserted
from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.spec import Regions, Spec
from peftc.passes.cost.cost import LOWERINGS, Sizes, alternatives, anonymous, cheapest, sizes_of, typical
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.resolve import check_base, survey
from peftc.passes.plan.structure import AdaptedSite, Structure, structure_of
from peftc.passes.plan.vocabulary import enlarged
from peftc.passes.quantized.schemes.known import packed_modules
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.init.calibration import imagined
from peftc.runtime.init.dense import ImaginedDense
from peftc.runtime.init.tokens import imagined as imagined_tokenizer
from peftc.runtime.model.adding import Values, make_adapter, plan_adapters
from peftc.runtime.model.weighted_plan import plan_combined
from peftc.runtime.regions.modules import become_regions
from peftc.runtime.regions.outline import partition_of
from peftc.runtime.regions.partition import Partition
from peftc.runtime.regions.places import DEFAULT

TOKENS = (1, 32, 1024)


def explain(
    spec: Spec | str | PathLike[str],
    model: nn.Module | FoundModel | str | PathLike[str],
    *,
    tokens: Sequence[int] = TOKENS,
    training: bool = False,
    why: bool = False,
) -> ExplainFacts:
    """How the adapters of a spec are lowered at every site of a model, and what each way costs.

    The adapters that start active are explained as they run, together; where none does, each is explained by itself.

    Args:
        spec: A path to an `.adapter` file, the text itself, or a Spec.
        model: A module, or what `find_model` takes.
        tokens: Of a call: batch times sequence. One answer for each number.
        training: With gradients. Otherwise the adapters are taken to be loaded for inference: what depends on them and
            the weights alone is computed once.
        why: Also tell what each pass left as it is, and why, and which modules are split because they cannot be traced.
            The model is traced and called once for that, with example inputs; else neither.

    Raises:
        SpecError: the spec is wrong, in itself or for this model.
        ModelError: the model cannot be found or loaded, or with `why` not traced.
        UsageError: a number of tokens is below one, or adapters that the spec combines cannot be.
    """
    for count in tokens:
        if count < 1:
            fail(UsageError, "E553", f"a call cannot have {count} tokens", help="give a number from 1")
    meant = spec if isinstance(spec, Spec) else read_spec(spec)
    found = as_found(model, meant)
    check_base(meant.base, survey(found.model))
    stored = quantized_copy(found.model, meant.quantize)
    ground = survey(stored)
    planned = plan_adapters(meant.adapters, ground, tokenizer_for(meant, found))
    plans = {each.name: each for each in planned.plans}
    larger = ground if planned.tokens is None else enlarged(ground, planned.tokens)
    for combined in meant.combined:
        plans[combined.name] = plan_combined(combined, plans, larger).plan
    together = [tuple(name for name, _ in meant.active)] if meant.active else [(name,) for name in plans]
    made = [_Imagined.of(stored, [plans[name] for name in names]) for names in together]
    told: Sequence[Refused | None] = [None] * len(together)
    if why:
        told = refusals(meant, found, together, training=training)
    return ExplainFacts(
        model=found.name,
        architecture=type(found.model).__name__,
        training=training,
        tokens=tuple(tokens),
        together=tuple(
            TogetherFacts(
                names,
                tuple(_groups(each, tokens, training)),
                tuple(part for name in names for part in inserted(plans[name])),
                None if refused is None else refused.by_passes,
                _partition(stored, each.structure, meant.regions) if refused is None else refused.partition,
                "" if refused is None else refused.untraced,
            )
            for names, each, refused in zip(together, made, told, strict=True)
        ),
        warnings=found.warnings,
    )


@dataclass(frozen=True)
class _Imagined:
    """Adapters that are active together, with tensors that have shapes and no numbers."""

    plans: Sequence[AdapterPlan]
    made: Sequence[AdapterParameters]
    structure: Structure

    @classmethod
    def of(cls, model: nn.Module, plans: Sequence[AdapterPlan]) -> "_Imagined":
        made = list(_imagined(model, plans))
        return cls(plans, made, structure_of([(each.plan, each.dtypes()) for each in made]))

    def lookup(self, position: int, site: str, role: str) -> torch.Tensor:
        return self.made[position].at_site(site)[role]


def _partition(model: nn.Module, structure: Structure, regions: Regions | None) -> Partition:
    """What an adapted model would tell of itself; this one has no adapters, and only learns where they would be."""
    state = adapt(model, regions=regions or DEFAULT)._adapter_state
    become_regions(state.engine.model, state.host, structure, state.regions)
    return partition_of(state.host, structure, state.regions)


def _groups(imagined: _Imagined, tokens: Sequence[int], training: bool) -> Iterator[GroupFacts]:
    structure, lookup, plans = imagined.structure, imagined.lookup, imagined.plans
    groups: dict[tuple[AdaptedSite, Sizes], list[str]] = {}
    for adapted in structure.sites:
        groups.setdefault((anonymous(adapted), sizes_of(adapted, lookup)), []).append(adapted.site.name)
    for (adapted, sizes), names in groups.items():
        site = adapted.site
        yield GroupFacts(
            sites=tuple(names),
            kind=site.kind,
            out_features=site.out_features,
            in_features=site.in_features,
            count=site.count,
            dtype=str(site.dtype).removeprefix("torch."),
            terms=tuple(
                TermFacts(
                    adapter=plans[term.position].name,
                    weight=algebra.text(term.weight),
                    bias=None if term.bias is None else algebra.text(term.bias),
                    shapes=dict(shapes),
                )
                for term, shapes in zip(adapted.terms, sizes, strict=True)
            ),
            calls=tuple(_call(adapted, sizes, count, training) for count in tokens),
        )


def _call(adapted: AdaptedSite, sizes: Sizes, tokens: int, training: bool) -> CallFacts:
    costs = alternatives(adapted, sizes, tokens, training=training, frozen=not training)
    return CallFacts(
        tokens=tokens,
        lowering=cheapest(adapted, sizes, typical(tokens), training=training, frozen=not training),
        costs={
            each: CostFacts(costs[each].flops, costs[each].bytes, costs[each].calls, costs[each].seconds)
            for each in LOWERINGS
            if each in costs
        },
    )


def _imagined(model: nn.Module, plans: Iterable[AdapterPlan]) -> Iterator[AdapterParameters]:
    """The adapters' tensors as they would be, without their numbers: some are made from weights, at some expense."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    packed = {f"{name}.weight": each.packing for name, each in packed_modules(model).items()}
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = {name: mode.from_tensor(each.detach()) for name, each in own if name not in packed}
    for plan in plans:
        with mode:
            dense = {name: torch.zeros(each.out_features, each.in_features) for name, each in packed.items()}
            base = {**tensors, **dense}.get
            values = Values(moments=imagined(plan), tokenizer=imagined_tokenizer, dense=ImaginedDense())
            yield make_adapter(plan, base, values)
