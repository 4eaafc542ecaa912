"""The graph and its upkeep: making nodes, tracing results, verification, running passes in order.

Every other room of `passes` builds on this one; it knows no adapter.

Never here: an adapter, a site, a law.
"""
