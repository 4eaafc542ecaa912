"""The JSON form holds the whole picture under stable names."""

import json

from peftc.compiler.diagram import build, to_json

NODE = {
    "id": str,
    "kind": str,
    "title": str,
    "lines": list,
    "module": str,
    "cluster": str,
    "shape": str,
    "site": str,
    "position": (int, type(None)),
    "weights": list,
    "operators": list,
    "members": list,
    "folded": list,
    "status": str,
}
EDGE = {"source": str, "target": str, "kind": str, "shape": str}
CLUSTER = {"path": str, "parent": str, "module": str, "label": str, "type": str, "fold": (dict, type(None))}


def fits(form: dict[str, object], schema: dict[str, object]) -> bool:
    return form.keys() == schema.keys() and all(isinstance(form[name], kind) for name, kind in schema.items())


def test_schema(llama) -> None:
    form = json.loads(to_json(build(llama.after("alike"), names=("alike",))))
    assert form.keys() == {"version", "adapters", "clusters", "nodes", "edges"}
    assert (form["version"], form["adapters"]) == (1, ["alike"])
    assert all(fits(node, NODE) for node in form["nodes"])
    assert all(fits(edge, EDGE) for edge in form["edges"])
    assert all(fits(cluster, CLUSTER) for cluster in form["clusters"])
    (fold,) = [cluster["fold"] for cluster in form["clusters"] if cluster["fold"]]
    assert (fold["count"], len(fold["paths"])) == (4, 4)


def test_references_resolve(llama) -> None:
    form = json.loads(to_json(build(llama.after("alike"))))
    nodes, clusters = {node["id"] for node in form["nodes"]}, {"", *(each["path"] for each in form["clusters"])}
    assert len(nodes) == len(form["nodes"])
    assert all({edge["source"], edge["target"]} <= nodes for edge in form["edges"])
    assert {node["cluster"] for node in form["nodes"]} <= clusters
    assert {cluster["parent"] for cluster in form["clusters"]} <= clusters
