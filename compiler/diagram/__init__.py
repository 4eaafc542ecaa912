"""Pictures of graphs: clusters follow the module tree, identical layers fold, adapters stand out.

Never here: a model, adapters' tensors; a change to a graph.
"""

from peftc.compiler.diagram.build import build
from peftc.compiler.diagram.difference import diff
from peftc.compiler.diagram.dot import to_dot
from peftc.compiler.diagram.json_form import to_json
from peftc.compiler.diagram.model import Picture
from peftc.compiler.diagram.svg import DRAWN, Drawn, graphviz, render, to_svg

__all__ = ["DRAWN", "Drawn", "Picture", "build", "diff", "graphviz", "render", "to_dot", "to_json", "to_svg"]
