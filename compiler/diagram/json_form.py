"""The picture as JSON, for scripts."""

import json
from dataclasses import asdict

from peftc.compiler.diagram.model import Picture

VERSION = 1


def to_json(picture: Picture) -> str:
    """`{"version", "adapters", "clusters", "nodes", "edges"}`; the fields are those of the classes in `model`."""
    form = asdict(picture)
    form["adapters"] = form.pop("names")
    for cluster, each in zip(form["clusters"], picture.clusters, strict=True):
        if each.fold is not None:
            cluster["fold"]["count"] = each.fold.count
    return json.dumps({"version": VERSION, **form}, ensure_ascii=False, indent=2) + "\n"
