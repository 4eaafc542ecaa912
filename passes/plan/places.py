"""What a rule needs to know of each site of an adapter: the site itself, and the others."""

import math
from collections.abc import Sequence

from peftc.grammar.method.expression_lowering import Place
from peftc.passes.plan.site import Site, category


def places(sites: Sequence[Site]) -> list[Place]:
    """The sites of one adapter as places, in order."""
    alike: dict[str, list[Site]] = {}
    for site in sites:
        alike.setdefault(category(site.name), []).append(site)
    largest = (max((each.in_features for each in sites), default=0), max((_out(each) for each in sites), default=0))
    sums = (sum(each.in_features for each in sites), sum(map(_out, sites)))
    total = sum(each.in_features * each.out_features for each in sites)
    found: list[Place] = []
    before = (0, 0)
    for index, site in enumerate(sites):
        own = category(site.name)
        found.append(
            Place(
                kind=site.kind,
                out_features=site.out_features,
                in_features=site.in_features,
                count=site.count,
                has_bias=site.has_bias,
                kernel=math.prod(site.kernel),
                name=site.name,
                largest=largest,
                sites=len(sites),
                total=total,
                sums=sums,
                index=index,
                before=before,
                category=own,
                members=len(alike[own]),
                tallest=max(map(_out, alike[own])),
                layers=site.layers,
                heads=site.heads,
                stacks=site.stacks,
            )
        )
        before = (before[0] + site.in_features, before[1] + site.out_features)
    return found


def _out(site: Site) -> int:
    return site.out_features
