"""What is known of passes and of drafts from those that were: how long they take, and how often they are right.

Old measurements count less and less: machines are shared, and texts change. Knows numbers and names of requests.
"""

from collections import defaultdict
from collections.abc import Iterable

FORGETTING = 0.97
"""Weight of a measurement when the next one comes: some thirty count."""

MIN_SAMPLES = 3
"""Steps and passes that are measured before they are believed."""

SLOPE_PRIOR = 0.1
"""How much longer a pass with one row more takes, as a share, until that is measured."""

PRIOR_RIGHT = 0.7
"""How often a draft is right before any was verified."""

REMEMBERED = 0.98
"""Weight of a round's drafts when the next round's come: shorter, and a few bad ones would end drafting for long."""

PRIOR_WEIGHT = 8.0
"""For how many drafts of a request the experience with others counts."""

OUTLIER = 2.0
"""A measurement longer than so many times the expected one is another program's doing: it counts as so much."""


class Cost:
    """Seconds of a pass by its number of rows, a straight line through what was measured lately."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        """A pass over so many rows took so long."""
        if self.num_samples >= MIN_SAMPLES:
            seconds = min(seconds, OUTLIER * self.of(num_rows))
        self.num_samples += 1
        self._weight = FORGETTING * self._weight + 1
        self._rows = FORGETTING * self._rows + num_rows
        self._seconds = FORGETTING * self._seconds + seconds
        self._rows_rows = FORGETTING * self._rows_rows + num_rows**2
        self._rows_seconds = FORGETTING * self._rows_seconds + num_rows * seconds

    def of(self, num_rows: int) -> float:
        """Expected seconds of a pass over so many rows."""
        mean_rows, mean = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_rows / self._weight - mean_rows**2
        covariance = self._rows_seconds / self._weight - mean_rows * mean
        # The prior counts like measurements one row apart.
        prior = SLOPE_PRIOR * mean / (1 + SLOPE_PRIOR * mean_rows)
        slope = max((covariance + prior / self._weight) / (spread + 1 / self._weight), 0.0)
        return max(mean + slope * (num_rows - mean_rows), mean / 10)


class DraftCost:
    """Seconds of a draft's pass, for each drafter: specialists differ in size."""

    def __init__(self) -> None:
        self._all = Cost()
        self._of_drafters: dict[int, Cost] = defaultdict(Cost)

    @property
    def num_samples(self) -> int:
        """Passes that were measured, whoever drafted."""
        return self._all.num_samples

    def add(self, drafter: int, num_rows: int, seconds: float) -> None:
        """A drafter's pass over so many rows took so long."""
        self._all.add(num_rows, seconds)
        self._of_drafters[drafter].add(num_rows, seconds)

    def of(self, drafter: int, num_rows: int) -> float:
        """Expected seconds of a drafter's pass; of one that was hardly measured as long as the others'."""
        own = self._of_drafters.get(drafter)
        return (self._all if own is None or own.num_samples < MIN_SAMPLES else own).of(num_rows)


class Acceptance:
    """How often a draft was right whose predecessors were: of one kind of drafts, lately."""

    def __init__(self) -> None:
        self._right = self._all = 0.0

    def add(self, num_drafts: int, num_right: int) -> None:
        """So many drafts were made at once; the first ones were right."""
        self._right = REMEMBERED * self._right + num_right
        self._all = REMEMBERED * self._all + min(num_right + 1, num_drafts)

    def rate(self, prior: float) -> float:
        """The share of right ones, between 0 and 1; little experience is filled up by `prior`."""
        return (self._right + PRIOR_WEIGHT * prior) / (self._all + PRIOR_WEIGHT)


_UNKNOWN = Acceptance()


class Experience:
    """How often drafts were right: of one drafter for one kind of requests, and for each request."""

    def __init__(self) -> None:
        self._of_kinds: dict[tuple[int, int], Acceptance] = defaultdict(Acceptance)
        self._of_requests: dict[tuple[str, int], Acceptance] = defaultdict(Acceptance)

    def add(self, request: str, drafter: int, kind: int, num_drafts: int, num_right: int) -> None:
        """So many drafts were made at once; the first ones were right."""
        self._of_kinds[drafter, kind].add(num_drafts, num_right)
        self._of_requests[request, drafter].add(num_drafts, num_right)

    def rate(self, request: str, drafter: int, kind: int) -> float:
        """The share of right drafts to expect, between 0 and 1."""
        of_kind = self._of_kinds.get((drafter, kind), _UNKNOWN).rate(PRIOR_RIGHT)
        return self._of_requests.get((request, drafter), _UNKNOWN).rate(of_kind)

    def forget_all_but(self, requests: Iterable[str]) -> None:
        """Drop what is known of requests that have ended."""
        kept = set(requests)
        for key in [key for key in self._of_requests if key[0] not in kept]:
            del self._of_requests[key]
