"""What goes where: sites found on a model, selectors matched, every parameter's shape settled.

A model's modules and a `Spec` enter, an `AdapterPlan` and the `Structure` of what is active leave. No graph yet.

Never here: a graph; a change to a module.
"""
