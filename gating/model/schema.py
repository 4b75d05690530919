"""The fusion file's schema: frozen models with one docstring per key. Knows no files, tokenizers or weights."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ultrafuser.gating.errors import FusionError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
EngineDtype = Literal["auto", "bfloat16", "float16", "float32", "fastest"]
Quantization = Literal["awq", "awq_marlin", "gptq", "gptq_marlin", "fp8", "compressed-tensors", "modelopt", "mxfp4"]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, Field(ge=1, le=2**63 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
PACKAGE_SCHEME = "package:"
FRESH_GATE = f"{PACKAGE_SCHEME}fresh"


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class SpecialistConfig(_Section):
    """One specialist: an ordinary language model, kept whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """Short unique name, used in the gate's metadata, in metrics and in responses; the first one leads."""

    model: Annotated[str, Field(min_length=1)]
    """A folder, a Hugging Face id, or `package:NAME` (weights out of an installed Python package)."""

    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id; null takes the newest. Pin a commit in production."""

    adapter: str | None = None
    """A low-rank adapter (folder or Hugging Face id) that is merged into the weights before serving."""

    chat_template: str | None = None
    """Jinja text, a file, or the name of a shipped template; null uses the template of the model's tokenizer."""

    dtype: Dtype | None = None
    """Type of this specialist's weights; null uses `engine.dtype`."""

    quantization: Quantization | None = None
    """vLLM's name of the weights' quantization; null reads it from the model's own configuration."""


class SamplingDefaults(_Section):
    """What a request that says nothing gets. Null: the neutral value of the OpenAI API (no change to the logits)."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Divides the fused logits before sampling; 0 is greedy."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the smallest set of tokens with at least this probability."""

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Keep the k most likely tokens; 0 and -1 keep all."""

    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop tokens less likely than this share of the likeliest token's probability."""

    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Above 1: tokens of the leader's prompt and of the output become less likely."""

    max_tokens: Count | None = None
    """Most tokens of a response; null leaves only the room in the context."""


DrafterName = Literal["leading", "ngram", "head"]


class SpeculationSettings(_Section):
    """Tokens are guessed ahead and verified by all specialists at once: the same text in fewer steps."""

    drafter: DrafterName | None = None
    """Who guesses: the specialist with the largest weight (`leading`), what followed the same tokens before (`ngram`),
    or a trained head (`head`); null: one of the first two, whichever is worth more for a request in a step."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """The head's folder; of the drafter `head` alone."""

    max_tokens: Annotated[int, Field(ge=0, le=16)] = 4
    """Most tokens guessed ahead for a request; 0 guesses none. How many it is, each step decides by what it costs."""

    min_tokens: Annotated[int, Field(ge=0, le=16)] = 0
    """Fewest tokens guessed ahead; as many as `max_tokens`: always so many."""

    @model_validator(mode="after")
    def _check(self) -> "SpeculationSettings":
        if self.min_tokens > self.max_tokens:
            raise FusionError(
                f"engine.speculation.min_tokens: {self.min_tokens} is more than max_tokens, {self.max_tokens}; lower it"
            )
        if (self.drafter == "head") != (self.path is not None):
            way_out = "name the head's folder" if self.path is None else "leave it out, or set drafter: head"
            raise FusionError(f"engine.speculation.path: is {self.path}, the drafter {self.drafter}; {way_out}")
        return self


class EngineSettings(_Section):
    """Settings of the one engine that runs all specialists. Null: the default, which is vLLM's where none is named."""

    dtype: EngineDtype | None = None
    """Type of the weights and of the KV cache, unless a specialist says otherwise. `fastest`: on a CPU float32 where
    bfloat16 would be emulated and float32 fits in the memory, else bfloat16; on a GPU as `auto`."""

    tensor_parallel_size: Count | None = None
    """Number of devices that each hold a shard of every specialist."""

    max_model_len: Count | None = None
    """Longest prompt plus response in tokens; default: the smallest of the specialists' own limits."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a device's memory for weights, activations and KV cache together."""

    kv_cache_memory_bytes: Bytes | None = None
    """Bytes of KV cache per device, all specialists together; set, it replaces the share above."""

    block_size: Count | None = None
    """Tokens per KV block. 32 on the CPU: its default of 128 never finds short shared prefixes."""

    num_gpu_blocks_override: Count | None = None
    """Number of KV blocks instead of the computed one; for tests of memory pressure."""

    max_num_seqs: Count | None = None
    """Most requests in one step."""

    max_num_batched_tokens: Count | None = None
    """Most tokens in one step; longer prompts are computed in chunks of this size."""

    max_step_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Longest time of a step: long prompts are read in pieces that fit; 0: no bound; default: 1.5 on a CPU, else 0."""

    enforce_eager: bool | None = None
    """Run without compilation and CUDA graphs: slower steps, quicker start."""

    enable_prefix_caching: bool | None = None
    """Share KV blocks between requests that begin with the same tokens for every specialist."""

    seed: Seed | None = None
    """Seed of the engine's own random numbers; a request may bring its own."""

    load_format: Literal["auto", "dummy"] | None = None
    """`dummy`: random weights in the place of the files' own, the same for models of one shape: what is said means
    nothing, speed and memory are the real ones."""

    speculation: SpeculationSettings | None = None
    """Guess tokens ahead; null: on a CPU with the defaults, on a GPU or with `placement: split` not; `max_tokens: 0`:
    not."""

    placement: Literal["shared", "split"] | None = None
    """Where specialists are: all on every device (`shared`, the default), or each on `tensor_parallel_size` devices of
    its own (`split`), where they compute side by side."""

    exchange: Literal["logits", "hidden"] | None = None
    """What split specialists send to the first one for each token: their logits (the default), or their last hidden
    states, which are less; the first one's devices then hold all output heads."""

    distributed_executor_backend: Literal["mp", "ray", "uni"] | None = None
    """How the devices' processes are started: on this machine (`mp`), on a Ray cluster, or in one process (`uni`)."""


class FusionConfig(_Section):
    """A fused model: its specialists, its gate, and how it is served."""

    name: Annotated[str, Field(min_length=1)]
    """The model name that clients send."""

    specialists: Annotated[tuple[SpecialistConfig, ...], Field(min_length=1)]
    """The specialists; the first leads: it samples, and prompt penalties look at its prompt."""

    gate: str | None = None
    """The gate's safetensors file, or `package:fresh` for an untrained gate; only a single specialist needs none."""

    eos_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    """Tokens that end a response, the same for every specialist; the first one closes earlier responses in prompts."""

    sampling_defaults: SamplingDefaults = SamplingDefaults()
    """Replaces the generation configs of the specialists, none of which is read."""

    tool_call_parser: str | None = None
    """vLLM's name of the parser that finds tool calls in a response; null leaves them as text."""

    reasoning_parser: str | None = None
    """vLLM's name of the parser whose markers a thought has; null tells no thoughts apart."""

    engine: EngineSettings = EngineSettings()
    """Settings of the engine."""

    @model_validator(mode="after")
    def _check(self) -> "FusionConfig":
        names = [specialist.name for specialist in self.specialists]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise FusionError(f"specialists: the name {twice[0]!r} is used twice; give each specialist its own")
        if self.gate is None and len(names) > 1:
            raise FusionError(
                f"gate: missing, but there are {len(names)} specialists; name a gate file, or package:fresh"
            )
        if len(set(self.eos_token_ids)) < len(self.eos_token_ids):
            raise FusionError(f"eos_token_ids: {list(self.eos_token_ids)} names an id twice; name each once")
        return self

    @property
    def specialist_names(self) -> tuple[str, ...]:
        """Names of the specialists in the file's order."""
        return tuple(specialist.name for specialist in self.specialists)

    def alone(self, specialist: SpecialistConfig) -> "FusionConfig":
        """The fusion with one model in the place of all, without a gate and a draft head."""
        changes = {"specialists": (specialist,), "gate": None}
        return self.without_draft_head().model_copy(update=changes)

    def without_draft_head(self) -> "FusionConfig":
        """The fusion without a trained draft head, which is of no use to any other models or gate than its own.

        How far ahead tokens are guessed, if the file says it, stays: another drafter guesses as far, or none where it
        is off.
        """
        before = self.engine.speculation
        if before is None or before.path is None:
            return self
        numbers = before.model_dump(include={"max_tokens", "min_tokens"}, exclude_unset=True)
        speculation = SpeculationSettings(**numbers) if numbers else None
        return self.model_copy(update={"engine": self.engine.model_copy(update={"speculation": speculation})})
