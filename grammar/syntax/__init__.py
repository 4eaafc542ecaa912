"""Text to trees and back: the lark grammar, syntax trees with spans, canonical formatting.

A `Source` enters; a `tree.File` leaves, or a diagnostic with a caret. Nothing here knows what a name means.

Never here: what a name means; a check that needs another line of the spec.
"""
