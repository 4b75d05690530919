"""What is wrong with a constraint: whoever wrote it has to change it."""


class ConstraintError(ValueError):
    """The constraint cannot be kept, or nothing fulfils it; the message says why, and at which place of a schema."""


def at(place: str, reason: str) -> ConstraintError:
    """An error at a JSON pointer."""
    return ConstraintError(f"{place or 'the schema'}: {reason}")
