"""Builds what a run trains with: the learner, its rows, the sampler, and the Trainer that takes them.

Loads weights. Knows all parts of training but the loop itself.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.data.batches import collate_hidden_states, collate_rows
from ultrafuser.gating.data.hidden_states import (
    CachedHiddenStates,
    cache_hidden_states,
    hidden_state_sources,
    resolve_dtype,
)
from ultrafuser.gating.model.cache import Report
from ultrafuser.gating.model.gate import Gate, fresh_gate
from ultrafuser.gating.model.gate_file import load_gate
from ultrafuser.gating.model.loading import add_adapter, load_frozen, load_one_frozen
from ultrafuser.gating.model.schema import FRESH_GATE
from ultrafuser.gating.training.draft_learner import (
    DraftLearner,
    collate_responses,
    draft_head_config,
    draft_vocabulary,
    fresh_draft_head,
)
from ultrafuser.gating.training.inputs import RunInputs
from ultrafuser.gating.training.keeping import FusionBefore, NewcomerReport, names_before
from ultrafuser.gating.training.learner import CachedLearner, FusedLearner, Learner
from ultrafuser.gating.training.newcomer import gate_before, gate_for_newcomer
from ultrafuser.gating.training.sampler import BalancedBatches, ProportionalBatches
from ultrafuser.gating.training.trainer import Collate, FusedTrainer

LearnerAndRows = tuple[Learner, Dataset[Any], Mapping[str, Dataset[Any]]]
"""What learns, and the rows to train and, by domain, to evaluate on."""


def build(
    inputs: RunInputs,
    device: torch.device,
    on_progress: Report,
    provenance: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> FusedTrainer:
    """Load or compute all that a run needs; `provenance` goes into every checkpoint, `callbacks` are the trainer's.

    Raises:
        SamplerError: the rows of a step cannot be shared by the processes.
    """
    arguments = _arguments(inputs, device)
    batches = _batches(inputs, arguments.process_index, arguments.world_size)
    micro_batch = inputs.micro_batch(arguments.world_size)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = micro_batch
    arguments.gradient_accumulation_steps = batches.micro_batches_per_step
    settings = inputs.settings
    collate: Collate = collate_rows
    learner: Learner
    if settings.drafter:
        learner, rows, eval_rows = _drafting(inputs, micro_batch, device, on_progress)
        provenance = {**provenance, "draft_vocabulary": learner.draft_vocabulary}
        collate = partial(
            collate_responses,
            eos_token_id=inputs.fusion.eos_token_ids[0],
            draft_ids_V=learner.draft_head.draft_ids_V,
        )
    elif settings.cache_states:
        learner, rows, eval_rows = _cached(inputs, micro_batch, device, on_progress)
        collate = collate_hidden_states
    else:
        learner, rows, eval_rows = _whole(inputs, device)
    trainer = FusedTrainer(
        learner,
        arguments,
        rows=rows,
        batches=batches,
        collate=collate,
        eval_rows=eval_rows,
        name_marks=partial(_name_marks, inputs),
        gate_learning_rate=settings.gate_learning_rate,
        patience=settings.early_stopping_patience,
        provenance=provenance,
        callbacks=callbacks,
    )
    if settings.add is not None:
        before = gate_before(inputs.loaded, inputs.info.hidden_sizes)
        learner.before = FusionBefore(before, inputs.info.num_shared_ids, settings.chunk_size)
        *others, name = inputs.fusion.specialist_names
        trainer.add_callback(NewcomerReport(name, others, inputs.domains))
    return trainer


def _whole(inputs: RunInputs, device: torch.device) -> LearnerAndRows:
    settings, dtype = inputs.settings, resolve_dtype(inputs.settings.precision, device)
    if settings.trains_specialists and not settings.uses_adapters:
        dtype = torch.float32  # what learns is kept in float32; autocast makes the arithmetic bfloat16
    specialists = load_frozen(inputs.fusion, dtype)
    for specialist, config in zip(specialists, inputs.fusion.specialists, strict=True):
        assert isinstance(specialist, PreTrainedModel)
        if settings.uses_adapters:
            add_adapter(specialist, config.adapter, **settings.lora)
        elif settings.trains_specialists:
            specialist.requires_grad_(True)
        if settings.gradient_checkpointing and settings.trains_specialists:
            specialist.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gate = _gate(inputs) if len(specialists) > 1 else None
    learner = FusedLearner(list(specialists), gate, inputs.info.num_shared_ids, settings.chunk_size)
    # A GPU computes a padded batch faster than its rows one by one; a CPU pays for every token of padding.
    learner.reads_rows_alone = device.type == "cpu"
    return learner, inputs.rows.dataset, {domain: own.dataset for domain, own in inputs.eval_rows.items()}


def _name_marks(inputs: RunInputs, domain: str) -> list[str]:
    if inputs.settings.drafter:
        return [f"{mark}_{domain}" for mark in DraftLearner.MARKS]
    names = inputs.fusion.specialist_names
    before = [] if inputs.settings.add is None else names_before(domain, names[:-1])
    return [*(f"gate_{domain}_{name}" for name in names), *before]


def _cached(inputs: RunInputs, micro_batch: int, device: torch.device, on_progress: Report) -> LearnerAndRows:
    rows, eval_rows, output_weights = _cached_rows(inputs, micro_batch, device, on_progress)
    learner = CachedLearner(output_weights, _gate(inputs), inputs.info.num_shared_ids, inputs.settings.chunk_size)
    return learner, rows, eval_rows


def _drafting(
    inputs: RunInputs, micro_batch: int, device: torch.device, on_progress: Report
) -> tuple[DraftLearner, Dataset[Any], Mapping[str, Dataset[Any]]]:
    settings, fusion, info = inputs.settings, inputs.fusion, inputs.info
    rows, eval_rows, output_weights = _cached_rows(inputs, micro_batch, device, on_progress)
    draft_ids_V = draft_vocabulary(rows.tokens(0, rows.offsets[-1])[1], settings.draft_vocabulary, info.num_shared_ids)
    leader = load_one_frozen(fusion, 0, resolve_dtype(settings.precision, device))
    embeddings_VD = leader.get_input_embeddings().weight.detach()[: info.num_shared_ids].clone()
    head_rows_VD = output_weights[0][draft_ids_V].float()
    head = fresh_draft_head(draft_head_config(inputs, len(draft_ids_V)), draft_ids_V, head_rows_VD)
    # The gate that engine and reference have, an untrained one too, which is the same for every seed of a run.
    gate = load_gate(str(fusion.gate), fusion.specialist_names, info.hidden_sizes)
    if not gate.kind.probabilities:
        output_weights = [own[draft_ids_V] for own in output_weights]
    learner = DraftLearner(head, gate, embeddings_VD, output_weights, settings.draft_tokens, settings.chunk_size)
    return learner, rows, eval_rows


def _cached_rows(
    inputs: RunInputs, micro_batch: int, device: torch.device, on_progress: Report
) -> tuple[CachedHiddenStates, dict[str, CachedHiddenStates], list[Tensor]]:
    """To train on, to evaluate on by domain, and the specialists' output layers [V, D_s]."""
    dtype = resolve_dtype(inputs.settings.precision, device)
    cache = partial(
        cache_hidden_states,
        sources=hidden_state_sources(inputs.fusion, inputs.info.hidden_sizes, dtype),
        num_shared_ids=inputs.info.num_shared_ids,
        batch_size=micro_batch,
        device=device,
        cache_dir=inputs.cache_dir,
        on_progress=on_progress,
    )
    rows, output_weights = cache(inputs.rows.dataset)
    eval_rows = {domain: cache(own.dataset)[0] for domain, own in inputs.eval_rows.items()}
    return rows, eval_rows, output_weights


def _gate(inputs: RunInputs) -> Gate:
    if inputs.settings.add is not None:
        return gate_for_newcomer(inputs.loaded, inputs.info.hidden_sizes)
    gate = inputs.fusion.gate
    assert gate is not None
    if gate == FRESH_GATE:
        return fresh_gate(inputs.info.hidden_sizes, seed=inputs.settings.seed, kind=inputs.gate_kind)
    return load_gate(gate, inputs.fusion.specialist_names, inputs.info.hidden_sizes)


def _batches(inputs: RunInputs, rank: int, num_processes: int) -> BalancedBatches:
    settings = inputs.settings
    kind = BalancedBatches if settings.sampling == "balanced" else ProportionalBatches
    return kind(
        {domain: inputs.rows.indices(domain) for domain in inputs.domains},
        rows_per_domain=settings.num_rows_per_domain,
        micro_rows_per_domain=settings.micro_rows(num_processes),
        num_steps=settings.num_steps,
        seed=settings.seed,
        rank=rank,
        num_processes=num_processes,
    )


def _arguments(inputs: RunInputs, device: torch.device) -> TrainingArguments:
    settings = inputs.settings
    is_evaluated = bool(inputs.eval_rows)
    return TrainingArguments(
        output_dir=str(settings.output_folder / RUN_FOLDER),
        max_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        # Frozen specialists are in their type already, and the gate's arithmetic is float32 in every precision.
        bf16=(settings.trains_specialists or settings.drafter)
        and resolve_dtype(settings.precision, device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to="none",  # trackers are called by a callback that bears their failures
        eval_strategy="steps" if is_evaluated else "no",
        eval_steps=settings.steps_between_evaluations,
        eval_on_start=is_evaluated,
        metric_for_best_model=None if settings.early_stopping_patience is None else "eval_loss",
        greater_is_better=False,
        save_strategy="steps",
        save_steps=settings.steps_between_saves,
        save_total_limit=settings.keep_checkpoints,
    )
