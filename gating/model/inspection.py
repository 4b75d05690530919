"""Looks at the models of a fusion before any weight is read: do they fit each other, the gate and the engine?

Reads configurations, tokenizers, the gate's header and a draft head. Does not know vLLM. It refuses what no engine
could fuse exactly: layers that keep other things than keys and values of tokens, tokenizers that disagree, a gate of
other sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ultrafuser.gating.errors import CommandError, DraftHeadError, FusionError, GateError
from ultrafuser.gating.files import read_json
from ultrafuser.gating.model.schema import FRESH_GATE, PACKAGE_SCHEME, FusionConfig, SpecialistConfig
from ultrafuser.gating.templates import TemplateError, fold_messages

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_WEIGHT_FILES = ("*.safetensors", "*.bin")
# Attributes by which configurations announce recurrent layers, whose state is no KV cache.
_RECURRENT = (
    "mamba",
    "ssm_",
    "state_size",
    "linear_attn",
    "linear_num",
    "hybrid_",
    "layers_block_type",
    "rwkv",
    "lru_",
)
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class FusedModelInfo:
    """What the engine must know about a fusion. One entry per specialist, in the file's order."""

    hidden_sizes: tuple[int, ...]
    """Width of the hidden state after the final norm."""

    vocab_sizes: tuple[int, ...]
    """Rows of the output layer; they may differ."""

    num_shared_ids: int
    """Ids 0..num_shared_ids-1 are the same token for all; only these are fused and sampled."""

    max_model_len: int
    """Longest prompt plus response, in tokens of any one specialist."""


def inspect_fusion(config: FusionConfig) -> FusedModelInfo:
    """Check a materialized fusion and say what it is made of; reads no weights but a draft head's.

    Raises:
        FusionError: one line that names the key: missing files, models that are not decoders with full or sliding
            attention, tokenizers that disagree, unknown EOS ids, a gate of other sizes or names, a draft head of others
            or with weights that are not finite, a context nobody can hold.
    """
    _check_gate_exists(config)
    model_configs = [_read_config(item, f"specialists.{index}") for index, item in enumerate(config.specialists)]
    for index, model_config in enumerate(model_configs):
        if refused := _why_not_fused(model_config):
            raise FusionError(
                f"specialists.{index}.model: {refused}; only decoders with full or sliding attention can be fused"
            )
    hidden_sizes = tuple(int(model_config.hidden_size) for model_config in model_configs)
    _check_gate(config, hidden_sizes)
    max_model_len = _max_model_len(config, model_configs)
    _check_tensor_parallel(config, model_configs)
    tokenizers = [_read_tokenizer(item, f"specialists.{index}") for index, item in enumerate(config.specialists)]
    vocab_sizes = tuple(int(model_config.vocab_size) for model_config in model_configs)
    num_shared_ids = _num_shared_ids(config, vocab_sizes, tokenizers)
    _check_draft_head(config, hidden_sizes, shared_vocabulary(tokenizers[0], num_shared_ids), num_shared_ids)
    for eos_id in config.eos_token_ids:
        if eos_id >= num_shared_ids:
            raise FusionError(
                f"eos_token_ids: {eos_id} is outside the {num_shared_ids} shared ids; no response could end with it,"
                " name a shared token"
            )
    leader_eos = tokenizers[0].eos_token_id
    if leader_eos is not None and leader_eos not in config.eos_token_ids:
        raise FusionError(
            f"eos_token_ids: lacks {leader_eos}, with which the tokenizer of {config.specialists[0].name!r} ends"
            f" structured output; add {leader_eos}"
        )
    for index, (specialist, tokenizer) in enumerate(zip(config.specialists, tokenizers, strict=True)):
        _check_template(specialist, tokenizer, f"specialists.{index}.chat_template")
    return FusedModelInfo(hidden_sizes, vocab_sizes, num_shared_ids, max_model_len)


def _read_config(specialist: SpecialistConfig, key: str) -> "PreTrainedConfig":
    # Imported late: transformers takes a second that a command line's --help should not.
    from transformers import AutoConfig

    if specialist.model.startswith(PACKAGE_SCHEME):
        raise FusionError(f"{key}.model: {specialist.model!r} is not a folder yet; materialize the fusion first")
    folder = Path(specialist.model)
    if folder.is_absolute() or folder.is_dir():
        check_model_folder(folder, f"{key}.model", "config.json")
    if specialist.adapter is not None and Path(specialist.adapter).is_absolute():
        check_model_folder(Path(specialist.adapter), f"{key}.adapter", "adapter_config.json")
    try:
        return AutoConfig.from_pretrained(specialist.model, revision=specialist.revision)
    except (OSError, ValueError, KeyError) as error:
        raise FusionError(
            f"{key}.model: no model configuration at {_source(specialist)} ({_first_line(error)});"
            " correct the id, the revision or the folder"
        ) from error


def check_model_folder(folder: Path, key: str, config_name: str) -> None:
    """See that a folder of a model, or of an adapter, is whole; `key` is of the fusion file.

    Raises:
        FusionError: it is not there, or lacks its configuration or weights; a file is cut off.
    """
    if not folder.is_dir():
        raise FusionError(f"{key}: no such folder {folder}; correct the path")
    if not (folder / config_name).is_file():
        raise FusionError(f"{key}: {folder} has no {config_name}; copy the whole model folder")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise FusionError(f"{key}: {folder} has no weights ({', '.join(_WEIGHT_FILES)}); copy the whole model folder")
    for index_file in folder.glob("*.index.json"):
        missing = sorted(shard for shard in _shards(index_file, key) if not (folder / shard).is_file())
        if missing:
            raise FusionError(f"{key}: {folder} has no {missing[0]}; copy the whole model folder")
    check_weights(folder, key)


def check_weights(folder: Path, key: str) -> None:
    """Look at the headers of a folder's weights, which say how long they are; `key` is of the fusion file.

    Raises:
        FusionError: a file is cut off.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise FusionError(f"{key}: {path} is damaged ({error}); copy the whole folder") from error


def _shards(index_file: Path, key: str) -> set[str]:
    """The files of weights that an index names."""
    try:
        names = read_json(index_file, "copy the whole model folder").get("weight_map")
    except CommandError as error:
        raise FusionError(f"{key}: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FusionError(f"{key}: {index_file} has no weight_map; copy the whole model folder")
    return set(names.values())


def _why_not_fused(model_config: "PreTrainedConfig") -> str | None:
    fields: dict[str, Any] = model_config.to_dict()
    if fields.get("is_encoder_decoder"):
        return "is an encoder-decoder model"
    if model_config.get_text_config() is not model_config:
        return f"is a multimodal model ({model_config.model_type}; of these, Gemma 3 is fused for its text)"
    architectures = fields.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return f"is no causal language model (architectures: {architectures})"
    recurrent = [name for name in fields if name.startswith(_RECURRENT)]
    if recurrent:
        return f"has recurrent layers ({recurrent[0]})"
    other_layers = {str(layer) for layer in fields.get("layer_types") or []} - _LAYER_TYPES
    if other_layers:
        return f"has layers of type {', '.join(sorted(other_layers))} (layer_types)"
    if fields.get("attention_chunk_size"):
        return f"has chunked attention (attention_chunk_size: {fields['attention_chunk_size']})"
    return None


def _check_gate_exists(config: FusionConfig) -> None:
    """First of all, as it takes no hub and is what a fresh copy of a preset lacks."""
    if config.gate is None or config.gate == FRESH_GATE:
        return
    if config.gate.startswith(PACKAGE_SCHEME):
        raise FusionError(f"gate: unknown {config.gate!r}; name a gate file, or {FRESH_GATE}")
    if not Path(config.gate).is_file():
        raise FusionError(f"gate: no such file {config.gate}; train a gate first, or use {FRESH_GATE} (untrained)")


def _check_gate(config: FusionConfig, hidden_sizes: tuple[int, ...]) -> None:
    # Imported late, as torch comes with it.
    from ultrafuser.gating.model.gate_file import check_gate

    if config.gate is None or config.gate == FRESH_GATE:
        return
    try:
        check_gate(config.gate, config.specialist_names, hidden_sizes)
    except GateError as error:
        raise FusionError(f"gate: {error}") from error


def _check_draft_head(
    config: FusionConfig, hidden_sizes: tuple[int, ...], vocabulary: str, num_shared_ids: int
) -> None:
    from ultrafuser.gating.model.draft_head import check_draft_head
    from ultrafuser.gating.model.gate_file import gate_digest

    speculation = config.engine.speculation
    if speculation is None or speculation.path is None or not speculation.max_tokens:
        return
    try:
        check_draft_head(
            speculation.path,
            config.specialist_names,
            hidden_sizes,
            vocabulary,
            num_shared_ids,
            gate_digest(config.gate),
        )
    except DraftHeadError as error:
        raise FusionError(f"engine.speculation.path: {error}") from error


def shared_vocabulary(tokenizer: "PreTrainedTokenizerBase", num_shared_ids: int) -> str:
    """Digest of the tokens that all specialists share, by any one's tokenizer."""
    from ultrafuser.gating.model.draft_head import vocabulary_digest

    return vocabulary_digest(_tokens(tokenizer, num_shared_ids))


def _max_model_len(config: FusionConfig, model_configs: Sequence["PreTrainedConfig"]) -> int:
    limits = {
        specialist.name: int(model_config.max_position_embeddings)
        for specialist, model_config in zip(config.specialists, model_configs, strict=True)
    }
    shortest = min(limits, key=lambda name: limits[name])
    wanted = config.engine.max_model_len
    if wanted is not None and wanted > limits[shortest]:
        raise FusionError(
            f"engine.max_model_len: {wanted} is more than the {limits[shortest]} positions of {shortest!r};"
            f" use at most {limits[shortest]}"
        )
    return wanted or limits[shortest]


def _check_tensor_parallel(config: FusionConfig, model_configs: Sequence["PreTrainedConfig"]) -> None:
    size = config.engine.tensor_parallel_size or 1
    for specialist, model_config in zip(config.specialists, model_configs, strict=True):
        num_heads = int(model_config.num_attention_heads)
        if num_heads % size:
            raise FusionError(
                f"engine.tensor_parallel_size: {size} does not divide the {num_heads} attention heads of"
                f" {specialist.name!r}; use a number that does"
            )


def _read_tokenizer(specialist: SpecialistConfig, key: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(specialist.model, revision=specialist.revision)
    except (OSError, ValueError, KeyError) as error:
        raise FusionError(
            f"{key}.model: no tokenizer at {_source(specialist)} ({_first_line(error)}); copy its files there"
        ) from error


def _num_shared_ids(
    config: FusionConfig, vocab_sizes: Sequence[int], tokenizers: Sequence["PreTrainedTokenizerBase"]
) -> int:
    sizes = zip(vocab_sizes, tokenizers, strict=True)
    num_shared_ids = min(min(vocab_size, len(tokenizer)) for vocab_size, tokenizer in sizes)
    leader, *others = [_tokens(tokenizer, num_shared_ids) for tokenizer in tokenizers]
    for index, tokens in enumerate(others, start=1):
        if tokens != leader:
            token_id = next(i for i in range(num_shared_ids) if tokens[i] != leader[i])
            raise FusionError(
                f"specialists.{index}.model: its tokenizer has {tokens[token_id]!r} at id {token_id} where that of"
                f" {config.specialists[0].name!r} has {leader[token_id]!r}; fuse models that share one vocabulary"
            )
    return num_shared_ids


def _tokens(tokenizer: "PreTrainedTokenizerBase", num_shared_ids: int) -> list[str | None]:
    token_of = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    return [token_of.get(token_id) for token_id in range(num_shared_ids)]


def _check_template(specialist: SpecialistConfig, tokenizer: "PreTrainedTokenizerBase", key: str) -> None:
    try:
        template = tokenizer.get_chat_template(specialist.chat_template)
        fold_messages([{"role": "user", "content": "probe"}], None, template)
    except TemplateError as error:
        raise FusionError(f"{key}: {str(error).removeprefix('chat_template: ')}") from error
    except ValueError as error:
        raise FusionError(
            f"{key}: missing, and the tokenizer of {specialist.model} has none; name a template"
        ) from error


def _source(specialist: SpecialistConfig) -> str:
    return f"{specialist.model!r}" + (f", revision {specialist.revision!r}" if specialist.revision else "")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
