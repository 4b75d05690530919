"""What is done between two steps so that the next one can give a request several tokens: learn, choose, draft.

Drafts are left with the leader's runner, where vLLM's worker looks for them and the scheduler takes them into its next
plan. Knows rows, runners and who drafts; verification is the sampler's (`server/engine/worker/verifying.py`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.gating.model.draft_head import load_draft_head
from ultrafuser.gating.model.schema import SpeculationSettings
from ultrafuser.server.engine.shared.extra_args import forced_token_ids, specialist_prompts
from ultrafuser.server.engine.shared.round import Decision, Undrafted
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.drafting import Drafter, EitherDrafter, NgramDrafter
from ultrafuser.server.engine.worker.experience import MIN_SAMPLES, DraftCost
from ultrafuser.server.engine.worker.head_drafter import HeadDrafter
from ultrafuser.server.engine.worker.lookahead import NGRAM, Ahead, Lookahead, Match


class _LookedUp(NamedTuple):
    """What followed a request's last tokens before, and may follow again."""

    num_outputs: int
    """The request's tokens when that was looked up."""

    num_matched: int
    token_ids: list[int]


class Speculation:
    """Drafts for the requests of a worker."""

    decisions: dict[str, Decision]
    """What was done for the requests of the next step; nothing for those whose response is given."""

    def __init__(
        self,
        leader: GPUModelRunner,
        settings: SpeculationSettings,
        num_specialists: int,
        num_shared_ids: int,
        leading: Callable[[DraftCost], Drafter],
        side_by_side: bool = False,
    ) -> None:
        """`leader` draws the tokens; `leading` makes the drafter by which specialists go on, `side_by_side` or not."""
        self._leader, self._num_specialists = leader, num_specialists
        self._max_tokens, self.num_shared_ids = settings.max_tokens, num_shared_ids
        only_looks_up = settings.drafter == "ngram"
        self.lookahead = Lookahead(settings.min_tokens, settings.max_tokens, only_looks_up, side_by_side)
        self.head = self._load_head(settings)
        self._features_BD: Tensor | None = None
        going_on = self.head or leading(self.lookahead.draft_pass)
        ngram = NgramDrafter(leader, num_shared_ids)
        self._ngram = ngram if settings.drafter in (None, "ngram") else None
        drafters: dict[str | None, Drafter] = {"ngram": ngram, None: EitherDrafter(going_on, ngram)}
        self.drafter = drafters.get(settings.drafter, going_on)
        self._looked_up: dict[str, _LookedUp] = {}
        self._kind = settings.drafter or "leading"
        self._leading: dict[str, int] = {}
        self._plan: dict[str, Ahead] = {}
        self._num_drafts: dict[str, int] = {}
        self.decisions = {}

    def _load_head(self, settings: SpeculationSettings) -> HeadDrafter | None:
        if settings.path is None:
            return None
        return HeadDrafter(self._leader, load_draft_head(settings.path), self.lookahead.draft_pass)

    @property
    def num_bytes(self) -> int:
        """Of memory that is taken whatever is drafted."""
        return 0 if self.head is None else self.head.num_bytes

    def see(self, hidden_SBD: Sequence[Tensor], marks_XB: Tensor) -> None:
        """Last hidden states of a step's rows that end in a token, before they are drawn; marks begin with weights."""
        if self.head is not None:
            self._features_BD = self.head.features(hidden_SBD, marks_XB[: self._num_specialists])

    def go_on(self, ending: Sequence[Row], marks_XB: Tensor | None, seconds: float | None) -> None:
        """Learn from a step whose tokens all runners know, and draft what follows them.

        `seconds` is what the step took, None if there was more in it than rows that end in a token.
        """
        if seconds is not None:
            self.lookahead.step.add(len(ending), seconds)
        self._learn(ending)
        if self.head is not None:
            self.head.forget_all_but(self._leader.input_batch.req_id_to_index)
            if self._features_BD is not None:
                self.head.read(ending, self._features_BD)
            self._features_BD = None
        self._leading = {} if marks_XB is None else self._last_leading(ending, marks_XB)
        drafts = self._draft(self._leading)
        self._leader._draft_token_ids = [drafts.get(request, []) for request in self._leader.input_batch.req_ids]

    def _learn(self, ending: Sequence[Row]) -> None:
        """How many drafts of each request were right."""
        rows: dict[str, list[Row]] = {}
        for row in ending:
            rows.setdefault(row.request, []).append(row)
        for request, (first, *_) in rows.items():
            # Those that the grammar refused, or that had no room, were as much in vain as wrong ones.
            num_drafts = self._num_drafts.get(request)
            if num_drafts and self._plan[request].drafter != NGRAM:
                num_right = self._num_outputs(request) - first.position - 1
                leading, drafter = self._leading[request], self._plan[request].drafter
                self.lookahead.experience.add(request, drafter, leading, num_drafts, num_right)
            if request in self._looked_up:
                self._compare(request, self._looked_up[request])
        self.lookahead.experience.forget_all_but(self._leader.requests)

    def _compare(self, request: str, looked_up: _LookedUp) -> None:
        """What was looked up costs nothing, and neither does it to learn what it would have been worth."""
        followed = self._leader.requests[request].output_token_ids[looked_up.num_outputs :]
        pairs = list(zip(looked_up.token_ids, followed, strict=False))
        num_right = next((index for index, (guess, token_id) in enumerate(pairs) if guess != token_id), len(pairs))
        if pairs:
            self.lookahead.experience.add(request, NGRAM, looked_up.num_matched, len(pairs), num_right)

    def _last_leading(self, ending: Sequence[Row], marks_XB: Tensor) -> dict[str, int]:
        """Which specialist has the largest weight at the last token of each request."""
        # One head drafts for all, and what was learned of it counts for all.
        leading_B = [0] * len(ending) if self.head else marks_XB[: self._num_specialists].argmax(dim=0).tolist()
        return {
            row.request: leading
            for row, leading in zip(ending, leading_B, strict=True)
            if row.position == self._num_outputs(row.request) - 1
        }

    def _draft(self, leading: dict[str, int]) -> dict[str, list[int]]:
        """Drafts by request: of a given response its own tokens, else the drafter's; none where no more is wanted."""
        wanted = {request: self._num_wanted(self._leader.requests[request]) for request in leading}
        given = {request: forced_token_ids(self._leader.requests[request].sampling_params) for request in leading}
        sampled = {own: index for own, index in leading.items() if given[own] is None and wanted[own]}
        self._looked_up = {}
        self._plan = self._agree(sampled) if sampled else {}
        guesses = self.drafter.propose(self._plan)
        drafts = {
            request: self._up_to_the_end(request, token_ids[: wanted[request]])
            for request, token_ids in guesses.items()
        }
        self._num_drafts = {request: len(token_ids) for request, token_ids in drafts.items()}
        for request, response in given.items():
            if response is not None:
                num_before = self._num_outputs(request)
                drafts[request] = list(response[num_before : num_before + wanted[request]])
        sampling = [request for request, response in given.items() if response is None]
        self.decisions = {request: self._decision(request, bool(drafts.get(request))) for request in sampling}
        return drafts

    def _decision(self, request: str, is_drafted: bool) -> Decision:
        if is_drafted:
            return Decision("ngram" if self._plan[request].drafter == NGRAM else self._kind)
        if request not in self._plan:
            params = self._leader.requests[request].sampling_params
            assert params is not None
            is_last = params.max_tokens is not None and params.max_tokens - self._num_outputs(request) <= 1
            return Decision(None, Undrafted.LAST_TOKEN if is_last else Undrafted.CONTEXT)
        ahead = self._plan[request]
        looked_up = self._looked_up.get(request) if ahead.drafter == NGRAM else None
        if ahead.num_tokens or (looked_up is not None and not looked_up.token_ids):
            return Decision(None, Undrafted.NOTHING_FOUND)
        is_measured = self.lookahead.step.num_samples >= MIN_SAMPLES
        return Decision(None, Undrafted.UNPAID if is_measured else Undrafted.UNMEASURED)

    def _look_up(self, requests: Iterable[str]) -> dict[str, _LookedUp]:
        if self._ngram is None:
            return {}
        return {
            request: _LookedUp(self._num_outputs(request), *self._ngram.look_up(request, self._max_tokens))
            for request in requests
        }

    def _agree(self, leading: dict[str, int]) -> dict[str, Ahead]:
        """The first rank's plan: clocks differ, and ranks with plans of their own would wait for each other forever."""
        group = get_tp_group()
        plan = self._choose(leading) if group.is_first_rank else {}
        return plan if group.world_size == 1 else group.broadcast_object(plan, src=0)

    def _choose(self, leading: dict[str, int]) -> dict[str, Ahead]:
        self._looked_up = self._look_up(leading)
        matches = {request: Match(own.num_matched, len(own.token_ids)) for request, own in self._looked_up.items()}
        return self.lookahead.choose(leading, 1 if self.head else self._num_specialists, matches)

    def _num_wanted(self, state: CachedRequestState) -> int:
        """How many drafts may help: the last token needs none, and near the end of the context not all have room."""
        assert state.sampling_params is not None
        if state.output_token_ids and state.output_token_ids[-1] in _ending_ids(state.sampling_params):
            return 0
        prompts = specialist_prompts(state.sampling_params)
        longest = max(map(len, prompts)) if prompts else state.num_prompt_tokens
        most = self._leader.num_spec_tokens
        if self._leader.max_model_len - 1 - longest - len(state.output_token_ids) < most:
            return 0
        max_tokens = state.sampling_params.max_tokens
        return most if max_tokens is None else max(min(most, max_tokens - len(state.output_token_ids) - 1), 0)

    def _up_to_the_end(self, request: str, token_ids: list[int]) -> list[int]:
        """Drafts without those behind a token that ends the response."""
        params = self._leader.requests[request].sampling_params
        assert params is not None
        ends = _ending_ids(params)
        return token_ids[: next((index + 1 for index, own in enumerate(token_ids) if own in ends), len(token_ids))]

    def _num_outputs(self, request: str) -> int:
        return len(self._leader.requests[request].output_token_ids)


def _ending_ids(params: SamplingParams) -> set[int | None]:
    """Tokens that end the response, as the scheduler will find."""
    return {params.eos_token_id, *(params.stop_token_ids or ())}
