"""What is missing, and how to get it. Knows nothing of either."""

from dataclasses import dataclass
from typing import Self

from ultrafuser.gating.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One thing that keeps the fusion from being served here."""

    what: str
    """What is wrong or missing; names the key of the fusion file, the package or the folder."""

    way_out: str
    """What to do, with the command where there is one."""

    @classmethod
    def of(cls, error: UserError | ValueError) -> Self:
        """An error as all of ours are written: what is wrong; way out."""
        what, _, way_out = str(error).rpartition("; ")
        return cls(what or str(error), way_out if what else "correct it")
