"""What a `method` definition means: parameters with shapes, initialisers, checkpoint keys and one expression.

A syntax tree enters, a checked `MethodRule` leaves; bound to values and a place it is a `BoundRule`.

Never here: a method by its name; text of a spec; a model.
"""
