"""The reference: the fused model as a plain Transformers model. It trains, evaluates offline, and judges the engine.

It reads conversations, one sequence per specialist, and answers them in lockstep (`respond`); of raw text, which is the
same for all specialists, it is a causal language model like any other (`generate`, Auto classes, other trainers).

Slow and obvious on purpose. It shares the gate's module with the engine, but neither its mixing nor its schedule, and
it knows no chat templates: callers bring token ids, one sequence per specialist.

Shape suffixes: S specialists, B requests, T positions (left-padded, per specialist), R response tokens (right-padded),
D hidden size of one specialist, V shared vocabulary.
"""

from collections.abc import Sequence
from dataclasses import field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.auto import AUTO_MAP, loading_options, write_source
from ultrafuser.gating.model.decoding import DecodingRules, Generation, decode
from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion, save_fusion
from ultrafuser.gating.model.gate import DEFAULT_WIDTH, Gate
from ultrafuser.gating.model.gate_file import load_gate, save_gate
from ultrafuser.gating.model.gate_kind import PAPER, GateKind
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.raw_text import FusedOutput, RawText
from ultrafuser.gating.model.responses import IGNORED_LABEL, gather_responses, last_hidden_states

# Models that change the logits after the output layer: the reference would have to know each one's formula.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class UltraFuserConfig(PreTrainedConfig):
    """Shape of a fused model: the configurations of its specialists, and what they share."""

    model_type = "ultrafuser"

    specialist_names: list[str] | None = None
    """Names in the fusion file's order; the first one leads."""

    specialist_configs: list[dict[str, Any]] | None = None
    """Each specialist's own configuration, as `to_dict` gives it."""

    num_shared_ids: int = 0
    """Width V of the fused logits."""

    gate_width: int = DEFAULT_WIDTH
    """Hidden width of the gate."""

    gate_kind: str = PAPER
    """Kind of the gate."""

    gate_projected_size: int | None = None
    """As of `Gate`."""

    auto_map: dict[str, str] = field(default_factory=lambda: dict(AUTO_MAP))
    """Where the Auto classes find the classes of a folder, in a process that has not imported them."""

    @property
    def vocab_size(self) -> int:
        """Tokens that can be predicted."""
        return self.num_shared_ids

    def save_pretrained(self, save_directory: str | PathLike[Any], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As Transformers, with the file that `auto_map` names."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_source(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Nothing: `auto_map` stands already, whereas Transformers would copy this module beside it."""


class UltraFuserForCausalLM(RawText, PreTrainedModel, GenerationMixin):  # which Transformers looks for by name
    """n specialists, kept whole, and a gate that mixes their logits token by token (paper: "The model")."""

    config_class = UltraFuserConfig
    config: UltraFuserConfig
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: UltraFuserConfig) -> None:
        super().__init__(config)
        # The gate's arithmetic is float32 in every precision; no specialist has a module of this name.
        self._keep_in_fp32_modules_strict = {"fusion_gate"}
        specialist_configs = [AutoConfig.for_model(**fields) for fields in config.specialist_configs or []]
        # from_pretrained states the wanted type as torch's default; a specialist's own configuration must not undo it.
        dtype, wanted = torch.get_default_dtype(), config._attn_implementation
        self.specialists = nn.ModuleList(
            AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=_attention(own, wanted))
            for own in specialist_configs
        )
        sizes = [specialist.hidden_size for specialist in specialist_configs]
        kind = GateKind.parse(config.gate_kind)
        gate = Gate(sizes, config.gate_width, kind, config.gate_projected_size) if len(sizes) > 1 else None
        self.fusion_gate = gate
        self.post_init()
        # post_init asks direct children only; the specialists, one list deeper, may tie their output layers.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    @classmethod
    def from_fusion(
        cls, fusion: FusionConfig, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
    ) -> "UltraFuserForCausalLM":
        """Load the specialists and the gate of a materialized fusion, in eval mode, on the CPU.

        Raises:
            FusionError: as `inspect_fusion`; an unmerged adapter; a model that changes its logits at the end.
        """
        info = inspect_fusion(fusion)
        specialists = []
        for index, specialist in enumerate(fusion.specialists):
            if specialist.adapter is not None:
                raise FusionError(f"specialists.{index}.adapter: not merged yet; materialize the fusion first")
            source: dict[str, Any] = {
                "pretrained_model_name_or_path": specialist.model,
                "revision": specialist.revision,
            }
            attention = _attention(AutoConfig.from_pretrained(**source), attn_implementation)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation=attention)
            _refuse_changed_logits(model.config, f"specialists.{index}.model")
            specialists.append(model)
        gate = None
        if fusion.gate is not None and len(specialists) > 1:
            gate = load_gate(fusion.gate, fusion.specialist_names, info.hidden_sizes)
        config = UltraFuserConfig(
            specialist_names=list(fusion.specialist_names),
            specialist_configs=[model.config.to_dict() for model in specialists],
            num_shared_ids=info.num_shared_ids,
            gate_width=gate.width if gate else DEFAULT_WIDTH,
            gate_kind=str(gate.kind) if gate else PAPER,
            gate_projected_size=gate.projected_size if gate else None,
            dtype=dtype,
        )
        # Built without memory, then filled: a second copy of every specialist would not fit where one does.
        with torch.device("meta"):
            fused = cls._from_config(config, attn_implementation=attn_implementation)
        fused.specialists = nn.ModuleList(specialists)
        fused.fusion_gate = gate
        assert fused.generation_config is not None
        fused.generation_config.eos_token_id = list(fusion.eos_token_ids)
        fused.generation_config.pad_token_id = fusion.eos_token_ids[0]
        return fused.eval()

    def save_as_fusion(self, folder: str | Path, like: FusionConfig) -> Path:
        """Write what other trainers made of the model as a fusion to serve: whole specialists, gate, fusion.yaml.

        Args:
            folder: is made, or its files of these names are replaced.
            like: the fusion that the model was loaded from; gives names, templates, tokenizers, and the engine but for
                a draft head, which is of no use to changed models.

        Returns:
            The path of fusion.yaml.
        """
        folder, like = Path(folder).resolve(), materialize(like.without_draft_head())
        specialists = []
        for model, own in zip(self.specialists, like.specialists, strict=True):
            target = folder / "specialists" / own.name
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(own.model, revision=own.revision).save_pretrained(target)
            specialists.append(own.model_copy(update={"model": str(target), "revision": None, "quantization": None}))
        changes: dict[str, Any] = {"specialists": tuple(specialists)}
        if self.fusion_gate is not None:
            save_gate(self.fusion_gate, folder / "gate.safetensors", like.specialist_names)
            changes["gate"] = str(folder / "gate.safetensors")
        save_fusion(like.model_copy(update=changes), folder / "fusion.yaml")
        return folder / "fusion.yaml"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers; also of a fusion's folder without weights of its own, whose fusion.yaml says what it is.

        Of the options such a folder heeds `dtype` (float32 by default), `attn_implementation`, and one `device_map`.

        Raises:
            FusionError: as `load_fusion`, `materialize` and `from_fusion`.
            ValueError: an option that would be ignored.
        """
        folder = Path(str(pretrained_model_name_or_path))
        if not (folder / "fusion.yaml").is_file() or any(folder.glob("model*.safetensors*")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        device, options = loading_options(kwargs)
        model = cls.from_fusion(materialize(load_fusion(folder / "fusion.yaml")), **options)
        return model.to(device) if device is not None else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing, as for the configuration."""

    def forward(
        self,
        input_ids: Tensor | Sequence[Tensor],
        attention_mask: Tensor | Sequence[Tensor] | None = None,
        response_mask: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        **text: Any,
    ) -> FusedOutput:
        """Fused logits and loss at the response tokens, each specialist read at its own positions of them.

        Of one tensor `input_ids` [B, T] it is raw text, the same for all specialists: see `read_text`.

        The r-th response token of a request is the same token in every specialist's sequence, though what surrounds
        it differs; the hidden state one position before it predicts it (paper: "Training").

        Args:
            input_ids: S tensors [B, T_s], left-padded: the conversation in each specialist's own template.
            attention_mask: S tensors [B, T_s], zero at the padding.
            response_mask: S bool tensors [B, T_s], true at every response token of every turn.
            labels: [B, R], to leave tokens out of the loss (-100); by default all response tokens count.

        Raises:
            ValueError: a mask is missing, no response tokens, a response at the first position, responses that differ
                between specialists, or a response token outside the shared vocabulary.
        """
        if isinstance(input_ids, Tensor):
            return self.read_text(input_ids, attention_mask, labels, **text)
        if attention_mask is None or response_mask is None:
            raise ValueError("attention_mask, response_mask: needed for one sequence per specialist")
        responses = [gather_responses(ids, mask) for ids, mask in zip(input_ids, response_mask, strict=True)]
        tokens_BR = responses[0].tokens_BR
        for name, other in zip(self.config.specialist_names or (), responses, strict=True):
            if not torch.equal(other.tokens_BR, tokens_BR):
                raise ValueError(f"response_mask: the response tokens of {name!r} differ from the leader's")
        labels_BR = tokens_BR if labels is None else labels
        if int(labels_BR.max()) >= self.config.num_shared_ids:
            raise ValueError(f"labels: {int(labels_BR.max())} is outside the shared vocabulary; it cannot be predicted")
        hidden_states = []
        for specialist, ids_BT, mask_BT, response in zip(
            self.specialists, input_ids, attention_mask, responses, strict=True
        ):
            hidden_BTD = last_hidden_states(specialist, ids_BT, mask_BT)
            index_BRD = response.predictors_BR.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
            hidden_states.append(hidden_BTD.gather(1, index_BRD))
        weights_SBR = self._weights(hidden_states, responses[0].turns_BR)
        logits_BRV = self._mix(weights_SBR, hidden_states)
        loss = nn.functional.cross_entropy(logits_BRV.flatten(0, 1), labels_BR.flatten(), ignore_index=IGNORED_LABEL)
        return FusedOutput(loss=loss, logits=logits_BRV, gate_weights=weights_SBR, labels=labels_BR)

    def next_token(
        self,
        input_ids: Sequence[Tensor],
        attention_mask: Sequence[Tensor],
        caches: Sequence[Cache] | None = None,
        memories: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fused logits [B, V] and gate weights [S, B] of the token after the last position.

        With `caches` (one per specialist) `input_ids` are only the positions that are not cached yet, while
        `attention_mask` covers all; the caches are extended in place. `memories` are what a smoothed gate has of each
        response's earlier states, S tensors [B, W], in whose place come those after this token; without them the token
        is the first of its response.
        """
        caches_S: Sequence[Cache | None] = caches or [None] * len(self.specialists)
        inputs = zip(self.specialists, input_ids, attention_mask, caches_S, strict=True)
        hidden_states = [last_hidden_states(*own)[:, -1] for own in inputs]
        if not memories:
            weights_SB = self._weights(hidden_states)
        else:
            gate = self.fusion_gate
            assert gate is not None
            told = list(enumerate(zip(hidden_states, memories, strict=True)))
            weights_SB = gate.weights_of(torch.stack([gate.part_of(index, *own) for index, own in told]))
            memories[:] = [gate.remember(index, *own) for index, own in told]
        return self._mix(weights_SB, hidden_states), weights_SB

    @torch.no_grad()
    def respond(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        *,
        generator: torch.Generator | None = None,
        use_cache: bool = False,
        **rules: Any,
    ) -> list[Generation]:
        """Continue a batch of requests in lockstep.

        Args:
            prompts: prompts[b][s] are request b's token ids in specialist s's template.
            generator: draws the tokens if `do_sample`.
            use_cache: keep KV caches instead of computing every step anew; same tokens, less time.
            rules: fields of `DecodingRules`: max_new_tokens, eos_token_ids, do_sample, temperature, penalties, ...

        Raises:
            ValueError: a prompt is missing or empty, or the rules do not fit the model.
        """
        return decode(self, prompts, DecodingRules(**rules), generator=generator, use_cache=use_cache)

    def first_memories(self) -> list[Tensor]:
        """S tensors [W]: what a smoothed gate has before a response's first token; none of a gate of another kind."""
        gate = self.fusion_gate
        if gate is None or not gate.kind.smoothed:
            return []
        return [torch.zeros(gate.width, device=self.device) for _ in self.specialists]

    def _weights(self, hidden_states: Sequence[Tensor], turns_BR: Tensor | None = None) -> Tensor:
        """Gate weights [S, ...] at hidden states [..., D]; `turns_BR` says of which response each state is."""
        if self.fusion_gate is None:
            return torch.ones(1, *hidden_states[0].shape[:-1], device=hidden_states[0].device)
        if turns_BR is None:
            return self.fusion_gate(hidden_states)
        weights_SN = self.fusion_gate([hidden.flatten(0, 1) for hidden in hidden_states], turns_BR.flatten())
        return weights_SN.view(-1, *turns_BR.shape)

    def _mix(self, weights_S: Tensor, hidden_states: Sequence[Tensor]) -> Tensor:
        """Fused logits in float32, on the shared vocabulary: the sum over specialists of weight times logits.

        Each one's logits are divided by its temperature first, if the gate is scaled. If it mixes probabilities they
        become the logarithm of the sum of weight times probability.
        """
        logits_SV = torch.stack(
            [
                _logits(specialist, hidden)[..., : self.config.num_shared_ids].float()
                for specialist, hidden in zip(self.specialists, hidden_states, strict=True)
            ]
        )
        gate = self.fusion_gate
        if gate is not None and gate.kind.scaled:
            temperatures_S = gate.log_temperatures.float().exp()
            logits_SV = logits_SV / temperatures_S.view(-1, *[1] * (logits_SV.dim() - 1))
        if gate is not None and gate.kind.probabilities:
            return (weights_S.log().unsqueeze(-1) + logits_SV.log_softmax(dim=-1)).logsumexp(dim=0)
        return (weights_S.unsqueeze(-1) * logits_SV).sum(dim=0)


def _attention(config: PreTrainedConfig, wanted: str) -> str:
    """What computes a model's attention: as wanted, but eager where sdpa lacks parts that the model has (sinks)."""
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return "eager" if wanted == "sdpa" and not model_class._supports_sdpa else wanted


def _logits(specialist: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = specialist.get_output_embeddings()(hidden)
    return logits


def _refuse_changed_logits(config: PreTrainedConfig, key: str) -> None:
    for name in _LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise FusionError(f"{key}: {name} changes the logits after the output layer; use another model")


AutoConfig.register(UltraFuserConfig.model_type, UltraFuserConfig)
AutoModelForCausalLM.register(UltraFuserConfig, UltraFuserForCausalLM)
