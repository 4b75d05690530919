"""How far to run ahead, decided in every step by measurement: what passes cost, and how often drafts were right.

A round costs one verification of all rows and, for each specialist that drafts, one pass a draft; it gives every
request as many tokens as drafts hold, and one more. Chosen is what gives most tokens a second, none included.
Knows numbers and names of requests; neither runners nor tokens.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FORGETTING = 0.97
"""Weight of a measurement when the next one comes: some thirty count."""

MIN_SAMPLES = 3
"""Steps and passes that are measured before they are believed."""

STEPS_BETWEEN_TRIALS = 50
"""Where drafts do not pay, one step in so many tries one all the same: what they are worth may have changed."""

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


@dataclass(frozen=True)
class Ahead:
    """How a request goes on."""

    drafter: int
    """The specialist that drafts."""

    num_tokens: int
    """Drafts."""


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


class Lookahead:
    """Chooses who drafts and how far, for every request of a step."""

    def __init__(self, min_tokens: int, max_tokens: int, is_free: bool = False) -> None:
        """Between `min_tokens` and `max_tokens` drafts a request; drafts of a drafter that `is_free` cost no pass."""
        self._lengths = range(min_tokens, max_tokens + 1)
        self._is_free = is_free
        self.step, self.draft_pass = Cost(), Cost()
        self._of_pairs: dict[tuple[int, int], Acceptance] = defaultdict(Acceptance)
        self._of_requests: dict[tuple[str, int], Acceptance] = defaultdict(Acceptance)
        self._num_undrafted = 0

    def add_round(self, request: str, leading: int, drafter: int, num_drafts: int, num_right: int) -> None:
        """A request's drafts were verified; `leading` led it when they were made."""
        self._of_pairs[drafter, leading].add(num_drafts, num_right)
        self._of_requests[request, drafter].add(num_drafts, num_right)

    def forget_all_but(self, requests: Iterable[str]) -> None:
        """Drop what is known of requests that have ended."""
        kept = set(requests)
        for key in [key for key in self._of_requests if key[0] not in kept]:
            del self._of_requests[key]

    def choose(self, leading: Mapping[str, int], num_specialists: int) -> dict[str, Ahead]:
        """How each request goes on, by the specialist that leads it."""
        longest = self._lengths[-1]
        if self._lengths[0] == longest:
            return {request: Ahead(own, longest) for request, own in leading.items()}
        if self.step.num_samples < MIN_SAMPLES:
            return {request: Ahead(own, self._lengths[0]) for request, own in leading.items()}
        if not self._is_free and self.draft_pass.num_samples < MIN_SAMPLES:
            return {request: Ahead(own, max(1, self._lengths[0])) for request, own in leading.items()}
        choices = [self._best(dict(leading), leading)]
        if not self._is_free and len(set(leading.values())) > 1:
            choices += [self._best(dict.fromkeys(leading, drafter), leading) for drafter in range(num_specialists)]
        _, plan = max(choices, key=lambda choice: choice[0])
        return self._try_now_and_then(plan, leading)

    def _try_now_and_then(self, plan: dict[str, Ahead], leading: Mapping[str, int]) -> dict[str, Ahead]:
        if any(own.num_tokens for own in plan.values()):
            self._num_undrafted = 0
            return plan
        self._num_undrafted += 1
        if self._num_undrafted % STEPS_BETWEEN_TRIALS:
            return plan
        request = max(leading, key=lambda own: self._rate(own, leading[own], leading[own]))
        return {**plan, request: Ahead(leading[request], 1)}

    def _best(self, drafters: Mapping[str, int], leading: Mapping[str, int]) -> tuple[float, dict[str, Ahead]]:
        """Most tokens a second, with one length for all requests of a drafter; and how each request goes on."""
        groups: dict[int, list[str]] = defaultdict(list)
        for request, drafter in drafters.items():
            groups[drafter].append(request)
        gains = {drafter: self._gains(own, drafter, leading) for drafter, own in groups.items()}
        sizes = {drafter: len(own) for drafter, own in groups.items()}
        lengths = dict.fromkeys(groups, self._lengths[0])
        for drafter in groups:
            trials = [{**lengths, drafter: length} for length in self._lengths]
            lengths = max(trials, key=lambda trial: self._tokens_a_second(trial, gains, sizes))
        plan = {request: Ahead(drafter, lengths[drafter]) for request, drafter in drafters.items()}
        return self._tokens_a_second(lengths, gains, sizes), plan

    def _gains(self, requests: Sequence[str], drafter: int, leading: Mapping[str, int]) -> list[float]:
        """Expected tokens of all these requests together, by the number of drafts of each."""
        rates = [self._rate(request, leading[request], drafter) for request in requests]
        # 1 + r + r^2 + ...: every draft counts if all before it were right.
        powers = [sum(rate**power for rate in rates) for power in range(self._lengths[-1] + 1)]
        return list(itertools.accumulate(powers))

    def _tokens_a_second(
        self, lengths: Mapping[int, int], gains: Mapping[int, list[float]], sizes: Mapping[int, int]
    ) -> float:
        num_tokens = sum(gains[drafter][length] for drafter, length in lengths.items())
        seconds = self.step.of(sum(sizes[drafter] * (1 + length) for drafter, length in lengths.items()))
        if not self._is_free:
            seconds += sum(length * self.draft_pass.of(sizes[drafter]) for drafter, length in lengths.items() if length)
        return num_tokens / seconds

    def _rate(self, request: str, leading: int, drafter: int) -> float:
        of_pair = self._of_pairs[drafter, leading].rate(PRIOR_RIGHT)
        return self._of_requests[request, drafter].rate(of_pair)
