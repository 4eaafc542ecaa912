"""Pictures of graphs: clusters follow the module tree, identical layers fold, adapters stand out.

Never here: a model, adapters' tensors; a change to a graph.
"""

from peftc.compiler.diagram.build import build
from peftc.compiler.diagram.difference import diff
from peftc.compiler.diagram.dot import to_dot
from peftc.compiler.diagram.json_form import to_json
from peftc.compiler.diagram.model import Picture
from peftc.compiler.diagram.svg import graphviz, to_svg

__all__ = ["Picture", "build", "diff", "graphviz", "to_dot", "to_json", "to_svg"]
