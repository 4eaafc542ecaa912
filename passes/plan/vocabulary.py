"""The vocabulary of a model, tokens that are new to it, and what the model would be with a larger one."""

from dataclasses import dataclass, replace

from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.syntax import tree
from peftc.passes.plan.resolve import ModelSurvey
from peftc.passes.plan.site import Site


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens a model's input embedding has, and its output head where that has a weight of its own."""

    size: int
    head: str = ""

    def beyond(self, spec: AdapterSpec) -> set[int]:
        """The tokens of a spec that the model has not."""
        found = (token for each in spec.tokens for token in each.tokens)
        return {token for token in found if isinstance(token, int) and token >= self.size}

    def grown(self, spec: AdapterSpec, size: int | None) -> tuple[AdapterSpec, int | None]:
        """The spec for a vocabulary of `size` that has its new tokens, and that size; None if there is no need of it.

        At an output head of its own new tokens have rows that nobody has trained, so there they are trained too.
        """
        if size is None or not (new := self.beyond(spec)) or max(new) >= size:
            return spec, None
        clauses = list(spec.tokens)
        for each in spec.tokens:
            if self.head and not each.modules and new & set(each.tokens):
                segments = tuple(tree.Segment((part,)) for part in self.head.split("."))
                clauses.append(replace(each, modules=(tree.PathSelector(segments),)))
        return replace(spec, tokens=tuple(clauses)), size


def vocabulary(ground: ModelSurvey) -> Vocabulary | None:
    """The vocabulary; None where the model does not say which module embeds its tokens."""
    embedding = _site(ground, ground.embedding)
    if embedding is None:
        return None
    head = _site(ground, ground.head)
    own = head is not None and embedding.weight not in (head.weight, *head.tied)
    return Vocabulary(embedding.in_features, ground.head if own else "")


def enlarged(ground: ModelSurvey, size: int) -> ModelSurvey:
    """What there would be if the token embeddings were resized, as transformers does."""
    resized = {ground.embedding, ground.head}
    for site in ground.sites:
        if site.module in (ground.embedding, ground.head):
            resized |= {name.rpartition(".")[0] for name in site.tied}
    sites = tuple(_with(site, size) if site.module in resized else site for site in ground.sites)
    tensors = {
        name: ((size, *shape[1:]) if name.rpartition(".")[0] in resized else shape, trained)
        for name, (shape, trained) in ground.tensors.items()
    }
    sizes = {site.name: site for site in sites}
    candidates = tuple(
        replace(each, in_features=sizes[each.name].in_features, out_features=sizes[each.name].out_features)
        for each in ground.universe.candidates
    )
    universe = replace(ground.universe, candidates=candidates)
    fronts = tuple(replace(site, in_features=size) if site.kind == "prompt" else site for site in ground.fronts)
    return replace(ground, sites=sites, tensors=tensors, universe=universe, fronts=fronts)


def _site(ground: ModelSurvey, module: str) -> Site | None:
    found = (site for site in ground.sites if module and site.module == module and site.leaf == "weight")
    return next(found, None)


def _with(site: Site, size: int) -> Site:
    return replace(site, in_features=size) if site.kind == "embedding" else replace(site, out_features=size)
