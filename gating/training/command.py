"""Trains a fused model: `ultrafuser train`. Stage 1 the gate, stage 2 gate and specialists, or one specialist alone.

Puts the parts together: inputs, learner, trainer, results. See docs/training.md.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.gating.commands.config_file import write_config
from ultrafuser.gating.commands.places import check_folder
from ultrafuser.gating.commands.provenance import PROVENANCE_FILE
from ultrafuser.gating.commands.run_folder import CONFIG_FILE, RUN_FOLDER
from ultrafuser.gating.errors import TrainError
from ultrafuser.gating.files import read_json
from ultrafuser.gating.model.cache import cache_folder
from ultrafuser.gating.progress_bar import StepProgress
from ultrafuser.gating.training.settings import TrainSettings, parse_settings

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from ultrafuser.gating.training.inputs import RunInputs
    from ultrafuser.gating.training.reporting import Trackers


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status. `cache` is the default of `--cache`.

    Raises:
        CommandError, FusionError: one line for the user.
    """
    train(parse_settings(argv, cache))
    return 0


def train(settings: TrainSettings) -> Path | None:
    """Train as the settings say; returns the new fusion's file, or None after a plan.

    Raises:
        CommandError, FusionError: what cannot be done, before any weight is loaded (DataError, SamplerError), or that
            training has gone wrong (NonFiniteLossError); then the last checkpoint stays.
    """
    from ultrafuser.gating.training.inputs import gather_inputs
    from ultrafuser.gating.training.origins import check_resumed, describe_origins
    from ultrafuser.gating.training.plan import describe
    from ultrafuser.gating.training.reporting import Trackers

    trackers = Trackers(settings.report_to)
    state = _processes()
    checkpoint, origins = None, {}
    check_folder(cache_folder(settings.cache), "--cache")
    if not settings.plan:
        for folder in (settings.output_folder, settings.output_folder / RUN_FOLDER):
            check_folder(folder, "--output")
        checkpoint = _checkpoint(settings, settings.output_folder / RUN_FOLDER)
        with closing(StepProgress(is_shown=state.is_main_process)) as progress:
            origins = describe_origins(settings, progress)
        if checkpoint is not None:
            check_resumed(read_json(checkpoint / PROVENANCE_FILE, "name another --output"), settings, origins)
    with closing(StepProgress(is_shown=state.is_main_process)) as progress:
        inputs = gather_inputs(settings, progress)
    if state.is_main_process:
        lines = [*inputs.rows.summary(), *describe(inputs, state.device, state.num_processes)]
        print("\n".join(lines), file=sys.stderr, flush=True)
    return None if settings.plan else _train(inputs, state.device, checkpoint, origins, trackers)


def _train(
    inputs: "RunInputs",
    device: "torch.device",
    checkpoint: Path | None,
    origins: dict[str, Any],
    trackers: "Trackers",
) -> Path:
    from transformers import set_seed

    from ultrafuser.gating.commands.provenance import collect_provenance
    from ultrafuser.gating.model.packaged import hidden_bars
    from ultrafuser.gating.training.building import build
    from ultrafuser.gating.training.reporting import EvaluationReport
    from ultrafuser.gating.training.results import save_results

    settings = inputs.settings
    set_seed(settings.seed)
    provenance = collect_provenance(settings.model_dump(mode="json"), inputs.data_digests, inputs.models)
    if inputs.fusion.gate is not None:
        provenance["gate_kind"] = str(inputs.gate_kind)
    with closing(StepProgress(is_shown=_processes().is_main_process)) as progress, hidden_bars():
        begun_with = {**provenance, "lasting": settings.lasting(), "origins": origins}
        trainer = build(inputs, device, progress, begun_with, [trackers, EvaluationReport()])
    if _processes().is_main_process:
        write_config(settings.output_folder / RUN_FOLDER / CONFIG_FILE, settings.as_config())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best_step = trainer.load_best()
    metrics = trainer.final_evaluation()
    state = trainer.trained_state()
    output = settings.output_folder
    path = output / "fusion.yaml"
    if _processes().is_main_process:
        manifest = {**provenance, "metrics": metrics, "history": trainer.state.log_history}
        if best_step is not None:
            manifest["best"] = {"step": best_step, "eval_loss": trainer.state.best_metric}
            print(f"best: step {best_step}, mean loss {trainer.state.best_metric:.4f}", file=sys.stderr, flush=True)
        with hidden_bars():
            path = save_results(output, inputs, trainer.learner, state, manifest)
        print(f"trained: {path}", file=sys.stderr, flush=True)
    trainer.accelerator.wait_for_everyone()
    return path


def _checkpoint(settings: TrainSettings, folder: Path) -> Path | None:
    """The checkpoint to go on from; a folder with another run in it is refused, not overwritten."""
    from ultrafuser.gating.training.checkpoints import all_checkpoints, newer_than, newest_whole, put_aside

    if not all_checkpoints(folder):
        return None
    if not settings.resume:
        raise TrainError(f"--output: {folder} has checkpoints of a run; add --resume, or name another folder")
    checkpoint, damages = newest_whole(folder)
    if checkpoint is None:
        raise TrainError(f"--resume: {damages[0]}, and no checkpoint in {folder} is whole; name another --output")
    if _processes().is_main_process:
        for damage in damages:
            print(f"{damage}; going on from {checkpoint.name}", file=sys.stderr, flush=True)
        put_aside(newer_than(checkpoint))
    return checkpoint


def _processes() -> "PartialState":
    """This process among those that train together; accelerate has to be told that there is no GPU."""
    import torch
    from accelerate import PartialState

    # The others wait while the first one writes a checkpoint or the result: minutes for large models.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=1))
