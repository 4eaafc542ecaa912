"""What an operator is to a reader: the work of the model, or the plumbing around it."""

import torch
from torch import fx

from peftc.passes.ir.emit import Origin

PLUMBING = frozenset(
    (
        "view",
        "reshape",
        "transpose",
        "permute",
        "t",
        "contiguous",
        "clone",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "flatten",
        "unflatten",
        "to",
        "_to_copy",
        "detach",
        "detach_",
        "lift_fresh_copy",
        "alias",
        "getitem",
        "split",
        "chunk",
        "split_with_sizes",
        "unbind",
        "narrow",
        "view_as",
        "type_as",
        "movedim",
        "swapaxes",
        "_unsafe_view",
        "dropout",
    )
)
ACTIVATIONS = frozenset(
    (
        "silu",
        "gelu",
        "relu",
        "tanh",
        "sigmoid",
        "softmax",
        "leaky_relu",
        "elu",
        "hardtanh",
        "hardswish",
        "mish",
        "selu",
    )
)
NORMS = frozenset(
    (
        "layer_norm",
        "rms_norm",
        "batch_norm",
        "group_norm",
        "native_layer_norm",
        "_native_batch_norm_legit",
    )
)
ATTENTION = "scaled_dot_product_attention"
MAJOR = ACTIVATIONS | NORMS | {"linear", "addmm", "matmul", "bmm", "mm", "baddbmm", "einsum", "embedding", ATTENTION}
TIMES = "\N{MULTIPLICATION SIGN}"
SYMBOLS = {"add": "+", "add_": "+", "mul": TIMES, "mul_": TIMES, "sub": "-", "div": "/", "cat": "concat"}


def name_of(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`."""
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            return str(schema.name.split("::")[-1])
        return str(getattr(node.target, "__name__", node.target))
    return str(node.op)


def origin_of(node: fx.Node) -> Origin | None:
    """Why a pass made the node; None for a node of the base."""
    origin = node.meta.get("peftc")
    return origin if isinstance(origin, Origin) else None


def holds_tensor(node: fx.Node) -> bool:
    """A tensor or several, rather than a size."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(each, torch.Tensor) for each in value)
    return isinstance(value, torch.Tensor)


def is_empty(node: fx.Node) -> bool:
    """A constant of no elements, which the exporter leaves where a cache begins."""
    value = node.meta.get("val")
    if origin_of(node) is not None:  # what makes room in front keeps the fake sizes of the shorter text
        return False
    return isinstance(value, torch.Tensor) and any(isinstance(size, int) and size == 0 for size in value.shape)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that hold something."""
    return [each for each in node.all_input_nodes if holds_tensor(each) and not is_empty(each)]


def is_plumbing(node: fx.Node) -> bool:
    """Moves or names numbers without computing any."""
    name = name_of(node)
    return name in PLUMBING or (name == "cat" and len(tensor_inputs(node)) == 1)


def shape_of(node: fx.Node) -> str:
    """The sizes, with a dot for those that vary from call to call."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return TIMES.join(str(each) if isinstance(each, int) else "·" for each in value.shape)
