"""The map of a data set: every conversation a point, near to those that a specialist reads alike (paper: Figure 3).

A conversation is the mean of the specialist's last hidden states over its response tokens; t-SNE brings them to the
plane. Knows states and pictures, not how data were made.

Shape suffixes: R conversations, D hidden size.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ultrafuser.gating.analysis.pictures import png
from ultrafuser.gating.analysis.styles import MARKERS, style_of
from ultrafuser.gating.commands.places import output_folder
from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.held_out import ReadingOptions, ReadingTask, prepare_task
from ultrafuser.gating.files import write_file, write_json
from ultrafuser.gating.model.cache import cache_folder
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.packaged import hidden_bars
from ultrafuser.gating.progress_bar import StepProgress
from ultrafuser.gating.synthesis.dataset.export import DATASET_FOLDER, TRAIN
from ultrafuser.gating.synthesis.settings import MapSettings

SIZE = (7.5, 6.5)
"""Inches."""

PERPLEXITY = 30.0
"""About as many neighbours each point looks at; fewer where there are few points."""

_LEAST_POINTS = 5


def draw_map(settings: MapSettings) -> Path:
    """Read the data set and draw it; returns the picture's path. Beside it, `map.json` has the points.

    Raises:
        CommandError, FusionError, DataError: no data set, no such fusion or specialist, too few conversations.
    """
    folder = Path(settings.output).expanduser() / DATASET_FOLDER
    path = folder / "data" / f"{TRAIN}.jsonl.gz"
    if not path.is_file():
        raise CommandError(f"{path}: no data set; run `ultrafuser data export {settings.output}` first")
    output_folder(folder, "output")
    output_folder(cache_folder(settings.cache), "--cache")
    place = _place(settings)
    options = ReadingOptions(
        cache_folder(settings.cache), settings.limit, settings.seed, settings.max_length, settings.precision
    )
    with closing(StepProgress()) as progress, hidden_bars():
        task = prepare_task(settings.fusion, [DataFile(path)], options, progress)
        if len(task.rows) < _LEAST_POINTS:
            raise CommandError(f"{path}: {len(task.rows)} conversations make no map; export {_LEAST_POINTS} or more")
        means_RD = mean_states(task, place)
        points_R2 = to_plane(means_RD, settings.seed)
    specialist = task.loaded.specialist_names[place]
    write_json(folder / "map.json", {"specialist": specialist, "points": _named(points_R2, task.places)})
    picture = folder / "map.png"
    write_file(picture, png(draw_points(points_R2, task.places, specialist)))
    return picture


def mean_states(task: ReadingTask, place: int) -> np.ndarray:
    """Mean hidden state of the specialist at `place` over each conversation's response tokens: float32 [R, D]."""
    states, _ = task.hidden_states(task.prepared, task.info.hidden_sizes, slice(place, place + 1))
    return torch.stack([states[row][0][0].float().mean(dim=0) for row in range(len(states))]).numpy()


def to_plane(means_RD: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of the directions (cosine distance), from their principal components: [R, 2]."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(means_RD) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
    points_R2: np.ndarray = tsne.fit_transform(means_RD)
    return points_R2


def draw_points(points_R2: np.ndarray, places: Mapping[str, Sequence[int]], specialist: str) -> Figure:
    """One colour and mark for each domain; the axes have no meaning and are left out."""
    figure = Figure(figsize=SIZE, layout="constrained")
    chart = figure.subplots()
    for index, (domain, rows) in enumerate(places.items()):
        own_R2 = points_R2[list(rows)]
        marker = MARKERS[index % len(MARKERS)]
        label = f"{domain} ({len(own_R2):,})"
        xs, ys = own_R2.T
        chart.scatter(xs, ys, s=12, c=style_of(index).colour, marker=marker, alpha=0.6, linewidths=0, label=label)
    chart.set_xticks([])
    chart.set_yticks([])
    chart.set_title(f"conversations as {specialist} reads them", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=len(places), frameon=False)
    return figure


def _place(settings: MapSettings) -> int:
    names = list(load_fusion(settings.fusion).specialist_names)
    if settings.specialist is not None and settings.specialist not in names:
        raise CommandError(f"--specialist: {settings.specialist!r} is none of {', '.join(names)}")
    return names.index(settings.specialist) if settings.specialist else 0


def _named(points_R2: np.ndarray, places: Mapping[str, Sequence[int]]) -> dict[str, list[list[float]]]:
    return {domain: points_R2[list(rows)].round(3).tolist() for domain, rows in places.items()}
