"""What a step costs on this machine, learned from the steps that it makes, and how much of a prompt fits into a bound.

A step costs something by itself (weights are read), something for each token, and something for each earlier position
that a token attends to: so a prompt's tokens cost more the further it is read. These three rates are fitted to the
steps of late; how slow the machine is just now, since others use it too, is followed more quickly. Knows numbers and
no requests.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

FIRST_CHUNK = 8
"""Prompt tokens of the first step, when nothing was measured yet."""

MARGIN = 0.9
"""Share of the bound that is planned for: a step takes longer than expected as often as not."""

LEAST_SHARE = 0.25
"""What the prompts get at least, as a share of the decodes' time: where these alone exceed the bound, prompts must be
read all the same."""

_REMEMBERED = 0.9
"""What is left of a step's weight in the fit after the next step of its kind."""

_RIDGE = 1e-6
"""Divides what one step alone cannot tell apart among the rates."""


@dataclass(frozen=True)
class Work:
    """The tokens of a step, or some of them."""

    num_tokens: int = 0
    """Decoded ones and prompts' ones."""

    num_attended: float = 0
    """Positions that they attend to, their own included, in sum."""

    @classmethod
    def span(cls, start: int, num_tokens: int) -> Self:
        """So many tokens of a request, from a position on."""
        return cls(num_tokens, num_tokens * start + num_tokens * (num_tokens + 1) / 2)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.num_tokens + other.num_tokens, self.num_attended + other.num_attended)

    @property
    def features(self) -> NDArray[np.float64]:
        """What the rates are multiplied by."""
        return np.array([1, self.num_tokens, self.num_attended], dtype=np.float64)


class _Steps:
    """Sums over the steps of one kind, for the rates r that make (r @ features) / seconds = 1, as nearly as can be.

    Errors are relative, so that one step that was held up does not count more than the others.
    """

    def __init__(self) -> None:
        self.products = np.zeros((3, 3))
        self.features = np.zeros(3)

    def add(self, features: NDArray[np.float64], seconds: float) -> None:
        """One more step; earlier ones count less."""
        relative = features / seconds
        self.products = _REMEMBERED * self.products + np.outer(relative, relative)
        self.features = _REMEMBERED * self.features + relative


def _rates(*kinds: _Steps) -> NDArray[np.float64]:
    """The least squares' rates; one that would be negative is 0."""
    products = np.sum([steps.products for steps in kinds], axis=0)
    features = np.sum([steps.features for steps in kinds], axis=0)
    scale = np.sqrt(np.diag(products))
    if not scale.all():
        return np.zeros(3)  # nothing was measured
    products = products / np.outer(scale, scale) + _RIDGE * np.eye(3)
    rates = np.zeros(3)
    used = [0, 1, 2]
    while used:
        solution = np.linalg.solve(products[np.ix_(used, used)], (features / scale)[used])
        if solution.min() >= 0:
            rates[used] = solution
            break
        del used[int(solution.argmin())]
    return rates / scale


class StepCost:
    """Rates of this machine, and the chunk that they allow."""

    def __init__(self) -> None:
        self._rates = np.zeros(3)
        self._slowness = 1.0
        # Steps of the one kind must not make those of the other forgotten: a server may decode for hours.
        self._fits = {False: _Steps(), True: _Steps()}
        self._proven = FIRST_CHUNK / 2
        self._granted = FIRST_CHUNK

    def seconds(self, work: Work) -> float:
        """What a step is expected to take, as of the last chunk; 0 before anything was measured."""
        return float(self._slowness * self._rates @ work.features)

    def learn(self, work: Work, num_prompt_tokens: int, seconds: float) -> None:
        """A step has taken so long; `num_prompt_tokens` of its tokens were prompts'."""
        self._fits[num_prompt_tokens > 0].add(work.features, seconds)
        if not num_prompt_tokens:
            return  # most steps only decode, and must not pay for this
        expected = self.seconds(work)
        if expected > 0:
            self._slowness *= math.sqrt(min(max(seconds / expected, 0.5), 2))
        self._proven = max(num_prompt_tokens, min(self._proven, self._granted))

    def chunk(self, bound: float, decodes: Work, start: int) -> int:
        """Prompt tokens, from a position on, that fit into a step of so many seconds beside decodes.

        At least one, and at most twice what was tried.
        """
        self._rates = _rates(*self._fits.values())
        decode_seconds = self.seconds(decodes)
        left = max(MARGIN * bound - decode_seconds, LEAST_SHARE * decode_seconds)
        fitting = self._fitting(left, start)
        self._granted = max(1, math.floor(min(fitting, 2 * self._proven)))
        return self._granted

    def _fitting(self, seconds: float, start: int) -> float:
        """The n with per_token * n + per_position * (n * start + n * n / 2) = seconds."""
        _, per_token, per_position = self._slowness * self._rates
        linear = per_token + per_position * (start + 0.5)
        divisor = linear + math.sqrt(linear * linear + 2 * per_position * seconds)
        return 2 * seconds / divisor if divisor > 0 else math.inf
