"""Where in the module tree a node was traced."""

from dataclasses import dataclass

from torch import fx

SEPARATOR = "."


@dataclass(frozen=True)
class Scope:
    """One call of one module: `path` tells several calls apart, `module` is the module's name."""

    path: str
    module: str
    type: str


def scopes(node: fx.Node) -> tuple[Scope, ...]:
    """The module calls around a node, outermost first. Nodes about sizes stand outside the tree."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if path == name:  # the exporter's mark for nodes it made itself
            continue
        found.append(Scope(str(path), str(path).split("@")[0], name.rpartition(SEPARATOR)[2]))
    return tuple(found)


def relative(module: str, parent: str) -> str:
    """`layers.0` for `model.layers.0` in `model`; nothing for the module itself."""
    if module == parent:
        return ""
    return module[len(parent) + 1 :] if parent and module.startswith(parent + SEPARATOR) else module
