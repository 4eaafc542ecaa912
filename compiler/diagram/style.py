"""Colours and shapes."""

BASE = {"fontname": "Helvetica", "fontsize": "10"}
INK, QUIET, FRAME, REMOVED, ADDED = "#343a40", "#adb5bd", "#ced4da", "#c92a2a", "#2b8a3e"
ADAPTERS = ("#e8590c", "#1971c2", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599")
DEPTHS = ("#ffffff", "#f8f9fa", "#f1f3f5", "#f8f9fa", "#ffffff")
FILLS = {
    "input": "#e7f5ff",
    "output": "#e7f5ff",
    "operator": "#ffffff",
    "attention": "#fff3bf",
    "norm": "#f3f0ff",
    "activation": "#e6fcf5",
    "add": "#ffffff",
    "multiply": "#ffffff",
    "plumbing": "#f8f9fa",
    "weight": "#f1f3f5",
    "join": "#ffffff",
    "widened": "#ffffff",
    "adapter": ADAPTERS[0],
}
SAYS = {
    "input": "input, output",
    "operator": "operator of the base, with the sizes of its weight",
    "attention": "attention",
    "norm": "norm",
    "activation": "activation",
    "plumbing": "masks, positions, rotations",
    "weight": "weight of the base that adapters read",
    "join": "where adapters meet the base",
    "widened": "made to fit what adapters put in front",
}


def adapter_colour(position: int) -> str:
    """One strong colour per adapter."""
    return ADAPTERS[position % len(ADAPTERS)]
