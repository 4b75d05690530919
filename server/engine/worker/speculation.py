"""What is done between two steps so that the next one can give a request several tokens: learn, choose, draft.

Drafts are left with the leader's runner, where vLLM's worker looks for them and the scheduler takes them into its next
plan. Knows rows, runners and who drafts; verification is the sampler's (`server/engine/worker/verifying.py`).
"""

from collections.abc import Sequence

from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.gating.model.draft_head import load_draft_head
from ultrafuser.gating.model.schema import SpeculationSettings
from ultrafuser.server.engine.shared.extra_args import forced_token_ids
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.drafting import Drafter, LeadingDrafter, NgramDrafter
from ultrafuser.server.engine.worker.head_drafter import HeadDrafter
from ultrafuser.server.engine.worker.lookahead import Ahead, Lookahead


class Speculation:
    """Drafts for the requests of a worker."""

    def __init__(self, runners: Sequence[GPUModelRunner], settings: SpeculationSettings, num_shared_ids: int) -> None:
        """`runners[0]` is the leader."""
        self._runners, self._leader = runners, runners[0]
        self.lookahead = Lookahead(settings.min_tokens, settings.max_tokens, is_free=settings.drafter == "ngram")
        self.head = self._load_head(settings)
        self._features_BD: Tensor | None = None
        self.drafter: Drafter
        if self.head is not None:
            self.drafter = self.head
        elif settings.drafter == "ngram":
            self.drafter = NgramDrafter(self._leader, num_shared_ids)
        else:
            self.drafter = LeadingDrafter(runners, num_shared_ids, self.lookahead.draft_pass)
        self._leading: dict[str, int] = {}
        self._plan: dict[str, Ahead] = {}

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
            self._features_BD = self.head.features(hidden_SBD, marks_XB[: len(self._runners)])

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
        for request, (first, *drafts) in rows.items():
            if drafts and request in self._plan:
                num_right = self._num_outputs(request) - first.position - 1
                leading, drafter = self._leading[request], self._plan[request].drafter
                self.lookahead.add_round(request, leading, drafter, len(drafts), num_right)
        self.lookahead.forget_all_but(self._leader.requests)

    def _last_leading(self, ending: Sequence[Row], marks_XB: Tensor) -> dict[str, int]:
        """Which specialist has the largest weight at the last token of each request."""
        # One head drafts for all, and what was learned of it counts for all.
        leading_B = [0] * len(ending) if self.head else marks_XB[: len(self._runners)].argmax(dim=0).tolist()
        return {
            row.request: leading
            for row, leading in zip(ending, leading_B, strict=True)
            if row.position == self._num_outputs(row.request) - 1
        }

    def _draft(self, leading: dict[str, int]) -> dict[str, list[int]]:
        """Drafts by request: of a given response its own tokens, else the drafter's; none where no more is wanted."""
        wanted = {request: self._num_wanted(request, self._leader.requests[request]) for request in leading}
        given = {request: forced_token_ids(self._leader.requests[request].sampling_params) for request in leading}
        sampled = {own: index for own, index in leading.items() if given[own] is None and wanted[own]}
        self._plan = (
            self._agreed(self.lookahead.choose(sampled, 1 if self.head else len(self._runners))) if sampled else {}
        )
        drafts = self.drafter.propose(self._plan) if self._plan else {}
        for request, response in given.items():
            if response is not None:
                drafts[request] = list(response[self._num_outputs(request) :])
        return {request: token_ids[: wanted[request]] for request, token_ids in drafts.items()}

    def _agreed(self, plan: dict[str, Ahead]) -> dict[str, Ahead]:
        """The first rank's plan: clocks differ, and ranks with plans of their own would wait for each other forever."""
        group = get_tp_group()
        return plan if group.world_size == 1 else group.broadcast_object(plan, src=0)

    def _num_wanted(self, request: str, state: CachedRequestState) -> int:
        """How many drafts may help: the last token needs none, and near the end of the context not all have room."""
        assert state.sampling_params is not None
        batches = (runner.input_batch for runner in self._runners)
        longest = max(int(batch.num_tokens_no_spec[batch.req_id_to_index[request]]) for batch in batches)
        most = self._leader.num_spec_tokens
        if self._leader.max_model_len - 1 - longest < most:
            return 0
        max_tokens = state.sampling_params.max_tokens
        return most if max_tokens is None else max(min(most, max_tokens - len(state.output_token_ids) - 1), 0)

    def _num_outputs(self, request: str) -> int:
        return len(self._leader.requests[request].output_token_ids)
