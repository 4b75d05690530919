"""How far to run ahead, decided in every step by measurement: what passes cost, and how often drafts were right.

A round costs one verification of all rows and, for each specialist that drafts, one pass a draft; where specialists
have devices of their own, several draft side by side, and the longest counts. What is looked up costs no pass. A round
gives every request as many tokens as drafts hold, and one more. Chosen is what gives most tokens a second, or none
where nothing promises much more. Knows numbers and names of requests; neither runners nor tokens.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ultrafuser.server.engine.worker.experience import MIN_SAMPLES, Cost, DraftCost, Experience

NGRAM = -1
"""In the place of a specialist that drafts: what followed the same tokens before."""

STEPS_BETWEEN_TRIALS = 50
"""Where a specialist's drafts do not pay, one step in so many tries one all the same: their worth may have changed."""

WORTHWHILE = 1.03
"""How many times as many tokens a second drafts must promise as none do: the best of many guesses promises too much."""


@dataclass(frozen=True)
class Ahead:
    """How a request goes on."""

    drafter: int
    """The specialist that drafts, or `NGRAM`."""

    num_tokens: int
    """Drafts."""


class Match(NamedTuple):
    """A place before where a request's last tokens stand, too."""

    num_matched: int
    """How many last tokens are the same: the more, the likelier is what followed there."""

    num_tokens: int
    """How many followed there, and can be drafts."""


class Lookahead:
    """Chooses who drafts and how far, for every request of a step."""

    def __init__(
        self, min_tokens: int, max_tokens: int, only_looks_up: bool = False, side_by_side: bool = False
    ) -> None:
        """Between `min_tokens` and `max_tokens` drafts a request.

        `only_looks_up`: no specialist drafts; `side_by_side`: several of them draft at the same time.
        """
        self._lengths = range(min_tokens, max_tokens + 1)
        self._runs_ahead = not only_looks_up
        self.side_by_side = side_by_side
        self.step, self.draft_pass = Cost(), DraftCost()
        self.experience = Experience()
        self._num_steps_without: dict[int, int] = defaultdict(int)
        """By specialist: in how many steps it led a request that went on, but drafted for none of those."""
        self._num_steps_since_trial = 0

    def choose(
        self, leading: Mapping[str, int], num_specialists: int, matches: Mapping[str, Match] | None = None
    ) -> dict[str, Ahead]:
        """How each request goes on, by the specialist that leads it and by what was looked up for it, if anything."""
        drafters = dict(leading) if self._runs_ahead else dict.fromkeys(leading, NGRAM)
        shortest = self._lengths[0]
        if self.step.num_samples < MIN_SAMPLES:
            return {request: Ahead(own, shortest) for request, own in drafters.items()}
        if self._runs_ahead and self.draft_pass.num_samples < MIN_SAMPLES:
            return {request: Ahead(own, max(1, shortest)) for request, own in drafters.items()}
        prospects = _Prospects(self, self._lengths, leading, matches or {})
        choices = [drafters]
        if self._runs_ahead and len(set(leading.values())) > 1:
            choices += [dict.fromkeys(leading, drafter) for drafter in range(num_specialists)]
        if self._runs_ahead:
            alone = choices.copy()
            for looked_up in prospects.worth_looking_up():
                choices += [own | dict.fromkeys(looked_up, NGRAM) for own in alone]
        _, chosen, lengths = max(map(prospects.best, choices), key=lambda choice: choice[0])
        plan = prospects.plan(chosen, lengths)
        return self._try_now_and_then(plan, leading) if self._runs_ahead else plan

    def _try_now_and_then(self, plan: dict[str, Ahead], leading: Mapping[str, int]) -> dict[str, Ahead]:
        """What a specialist's drafts are worth is known only if there are some: one step in so many has a trial, of the
        specialist that has not drafted for longest, whatever others do meanwhile."""
        for specialist in set(leading.values()):
            self._num_steps_without[specialist] += 1
        for request, ahead in plan.items():
            if ahead.num_tokens and ahead.drafter == leading[request]:
                self._num_steps_without[ahead.drafter] = 0
        self._num_steps_since_trial += 1
        stalest = max(leading.values(), key=lambda own: self._num_steps_without[own])
        if min(self._num_steps_since_trial, self._num_steps_without[stalest]) < STEPS_BETWEEN_TRIALS:
            return plan
        self._num_steps_since_trial = self._num_steps_without[stalest] = 0
        led = [request for request, own in leading.items() if own == stalest]
        request = max(led, key=lambda own: self.experience.rate(own, stalest, stalest))
        return {**plan, request: Ahead(stalest, max(1, self._lengths[0]))}


class _Prospects:
    """What drafts of one step would give, by who drafts for whom."""

    def __init__(
        self, known: Lookahead, lengths: range, leading: Mapping[str, int], matches: Mapping[str, Match]
    ) -> None:
        self._known, self._lengths, self._leading, self._matches = known, lengths, leading, matches
        self._gains: dict[tuple[str, int], list[float]] = {}

    def best(self, drafters: Mapping[str, int]) -> tuple[float, Mapping[str, int], dict[int, int]]:
        """Most tokens a second, with one length for all requests of a drafter; who drafts, and those lengths."""
        requests: dict[int, list[str]] = defaultdict(list)
        for request, drafter in drafters.items():
            requests[drafter].append(request)
        groups = {drafter: self._group(drafter, own) for drafter, own in requests.items()}
        # Where drafters share the time of a pass, one alone may not be worth it, and all together may.
        begin = self._lengths if self._known.side_by_side else self._lengths[:1]
        lengths = max(
            (dict.fromkeys(groups, length) for length in begin), key=lambda trial: self._tokens_a_second(trial, groups)
        )
        for drafter in groups:
            trials = [{**lengths, drafter: length} for length in self._lengths]
            lengths = max(trials, key=lambda trial: self._tokens_a_second(trial, groups))
        tokens_a_second, without = self._tokens_a_second(lengths, groups), dict.fromkeys(groups, 0)
        if self._lengths[0] == 0 and tokens_a_second < WORTHWHILE * self._tokens_a_second(without, groups):
            return self._tokens_a_second(without, groups), drafters, without
        return tokens_a_second, drafters, lengths

    def plan(self, drafters: Mapping[str, int], lengths: Mapping[int, int]) -> dict[str, Ahead]:
        """How each request goes on, with these drafts by drafter."""
        return {own: Ahead(drafter, self._longest(own, drafter, lengths[drafter])) for own, drafter in drafters.items()}

    def worth_looking_up(self) -> list[list[str]]:
        """Requests for which something was found: all, and those of which it is the better guess."""
        found = [request for request, match in self._matches.items() if match.num_tokens]
        better = [own for own in found if self._rate(own, NGRAM) >= self._rate(own, self._leading[own])]
        return [own for own in (found, better if better != found else []) if own]

    def _gain(self, request: str, drafter: int) -> list[float]:
        """Expected tokens by number of drafts, 1 + r + r^2 + ...: a draft counts if all before it were right."""
        if (request, drafter) not in self._gains:
            rate, longest = self._rate(request, drafter), self._longest(request, drafter, self._lengths[-1])
            powers = (rate**power if power <= longest else 0.0 for power in range(self._lengths[-1] + 1))
            self._gains[request, drafter] = list(itertools.accumulate(powers))
        return self._gains[request, drafter]

    def _rate(self, request: str, drafter: int) -> float:
        kind = self._matches[request].num_matched if drafter == NGRAM else self._leading[request]
        return self._known.experience.rate(request, drafter, kind)

    def _longest(self, request: str, drafter: int, length: int) -> int:
        return min(length, self._matches[request].num_tokens) if drafter == NGRAM else length

    def _group(self, drafter: int, requests: Sequence[str]) -> "_Group":
        most = range(self._lengths[-1] + 1)
        longest = [self._longest(request, drafter, most[-1]) for request in requests]
        return _Group(
            gains=[sum(own) for own in zip(*(self._gain(request, drafter) for request in requests), strict=True)],
            num_rows=[sum(1 + min(length, own) for own in longest) for length in most],
            pass_seconds=0.0 if drafter == NGRAM else self._known.draft_pass.of(drafter, len(requests)),
        )

    def _tokens_a_second(self, lengths: Mapping[int, int], groups: Mapping[int, "_Group"]) -> float:
        num_tokens, num_rows, seconds = 0.0, 0, [0.0]
        for drafter, length in lengths.items():
            group = groups[drafter]
            num_tokens += group.gains[length]
            num_rows += group.num_rows[length]
            seconds.append(length * group.pass_seconds)
        drafting = max(seconds) if self._known.side_by_side else sum(seconds)
        return num_tokens / (drafting + self._known.step.of(num_rows))


class _Group(NamedTuple):
    """All requests of a drafter: tokens to expect and rows, by the number of drafts of each; seconds of a draft."""

    gains: list[float]
    num_rows: list[int]
    pass_seconds: float
