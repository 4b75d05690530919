"""The report of a step, from the scheduler to whoever counts it in the API process: what it says and how it travels.

Knows arrays and names, not who sends and who counts.

Shapes: S specialists, T tokens of one step, X = S + 4 marks of a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrafuser.server.engine.shared.round import Round
from ultrafuser.server.engine.shared.step import NUM_OTHER_MARKS, Span

GATE = "gate"
"""The gate's name among those whose values may be not finite."""


@dataclass(frozen=True)
class StepReport:
    """What one step of the engine did."""

    weights_TS: NDArray[np.float32]
    """The gate's weights of each token that was handed out."""

    is_overridden_T: NDArray[np.bool_]
    """Whether the mixture's best token is another than that of the specialist with the largest weight."""

    num_agreeing_T: NDArray[np.int64]
    """How many specialists agree on one best token."""

    nonfinite: list[str]
    """Whose values ended a request: specialists or the gate, once for each request."""

    spans: list[Span]
    """How long parts of a step took."""

    rounds: list[Round]
    """What became of the drafts of the requests that were given these tokens; none without speculation."""


def pack(
    marks_TX: NDArray[np.float32], rounds: Sequence[Round], culprits: Iterable[int], spans: Sequence[Span]
) -> dict[str, Any]:
    """A report in types that vLLM's serializer takes; `culprits` are those of the ended requests, as bits."""
    return {"marks": marks_TX.tobytes(), "rounds": rounds, "culprits": list(culprits), "spans": spans}


def unpack(payload: dict[str, Any], specialists: Sequence[str], is_counted: Sequence[bool]) -> StepReport:
    """The report of a payload, without the tokens that are not counted; a flag for each token."""
    marks_TX = np.frombuffer(payload["marks"], np.float32).reshape(-1, len(specialists) + 1 + NUM_OTHER_MARKS)
    marks_TX = marks_TX[np.array(is_counted, dtype=bool)]
    sources = [*specialists, GATE]
    return StepReport(
        weights_TS=marks_TX[:, : len(specialists)],
        is_overridden_T=marks_TX[:, -3] > 0,
        num_agreeing_T=marks_TX[:, -2].astype(np.int64),
        nonfinite=[source for bits in payload["culprits"] for index, source in enumerate(sources) if bits >> index & 1],
        spans=[Span(*span) for span in payload["spans"]],
        rounds=[own for own in (Round(*fields) for fields in payload["rounds"]) if is_counted[own.first_token]],
    )
