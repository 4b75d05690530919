"""The nodes of a Ray cluster, before a weight is loaded: which of them have room, what they have, whether they fit.

Importing this module imports vLLM, but not Ray: that it does when it is needed. When the nodes have met this process is
no driver of the cluster any more: a lost cluster ends its drivers at once, and this one has clients to tell.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultrafuser.gating.errors import UserError
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.server.engine.shared.node import num_ranks
from ultrafuser.server.engine.shared.options import EngineOptionError, engine_arguments
from ultrafuser.server.engine.shared.ray_cluster import (
    CPU_RESOURCE,
    RayNode,
    RayPlacement,
    cluster_nodes,
    connect,
    device_key,
    names_of,
    place,
)
from ultrafuser.server.engine.shared.spec import ADDITIONAL_CONFIG_KEY, EngineSpec
from ultrafuser.server.engine_options import EngineOptions
from ultrafuser.server.settings import PREFIX, EngineStartError, ServerSettings, read_environment
from ultrafuser.server.start import installed
from ultrafuser.server.start.likeness import differences, likeness, one_line
from ultrafuser.server.start.preparing import Prepared, prepare
from ultrafuser.server.start.progress import StartupProgress

_OPTION = "distributed_executor_backend: ray"
_LOOK_SECONDS = 1.0
_REMIND_SECONDS = 30.0
_KNOWN = frozenset(ServerSettings.model_fields) | frozenset(EngineOptions.model_fields)


def meet_ray(settings: ServerSettings, prepared: Prepared, progress: StartupProgress) -> RayPlacement:
    """Choose the nodes, have each prepare its own models, and see that all are alike.

    Raises:
        EngineOptionError: there is no cluster, or too little room in it for `node_timeout`; a node differs, or says
            what is wrong with its own models.
        EngineStartError: a node is gone, or failed otherwise.
    """
    import ray

    with progress.step("meet the nodes of the Ray cluster"), _driver():
        own = ray.get_runtime_context().get_node_id()
        nodes, node_ids = _find_room(num_ranks(prepared.fusion), own, settings.node_timeout, progress)
        names = names_of(nodes)
        others = [node_id for node_id in dict.fromkeys(node_ids) if node_id != own]
        _refuse(installed.installed_versions(), _ask(others, names, _versions(), (), progress), names)
        arguments = (_everywhere(settings.fusion), settings.cache, _options_everywhere(prepared))
        described = _ask(others, names, describe, arguments, progress)
        for node_id in others:
            if "refusal" in described[node_id]:
                raise EngineOptionError(
                    f"{_OPTION}: node {names[node_id]}: {described[node_id]['refusal']}; {PREFIX}FUSION and "
                    f"{PREFIX}CACHE in the environment of its `ray start` name its own files"
                )
        _refuse(likeness(prepared), {node_id: described[node_id]["likeness"] for node_id in others}, names)
        specs = {node_id: EngineSpec.model_validate(described[node_id]["spec"]) for node_id in others}
        if own in node_ids:
            specs[own] = _spec(prepared)
        for node_id in dict.fromkeys(node_ids):
            progress.say(f"      node {names[node_id]}: {node_ids.count(node_id)} of {len(node_ids)} ranks")
        return RayPlacement(address=ray.get_runtime_context().gcs_address, node_ids=node_ids, specs=specs)


def describe(fusion: str, cache: str | None, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """What a node has, said by itself: its models prepared, what has to be alike, and its own paths.

    Its environment may name another fusion file and cache than the server's command line did.
    """
    try:
        own = read_environment(os.environ, _KNOWN)
        settings = ServerSettings(fusion=own.get("fusion", fusion), cache=own.get("cache", cache))
        prepared = prepare(settings, engine_options, load_fusion(settings.fusion), StartupProgress(1))
        return {"likeness": likeness(prepared), "spec": _spec(prepared).model_dump(mode="json")}
    except UserError as error:
        return {"refusal": str(error)}


def _options_everywhere(prepared: Prepared) -> dict[str, Any]:
    """The options that were given; a draft head's folder by its whole path, at which every node has to have it."""
    options = dict(prepared.engine_options)
    speculation = options.get("speculation")
    if isinstance(speculation, Mapping) and speculation.get("path"):
        path = Path(speculation["path"]).expanduser().absolute()
        options["speculation"] = {**speculation, "path": str(path)}
    return options


def _spec(prepared: Prepared) -> EngineSpec:
    arguments = engine_arguments(prepared.fusion, prepared.info, prepared.engine_options)
    return EngineSpec.model_validate(arguments["additional_config"][ADDITIONAL_CONFIG_KEY])


@contextmanager
def _driver() -> Iterator[None]:
    import ray

    connect(os.environ.get("RAY_ADDRESS"), tells_workers_output=False)
    try:
        yield
    finally:
        ray.shutdown()


def _find_room(
    wanted: int, own: str, seconds: float, progress: StartupProgress
) -> tuple[list[RayNode], tuple[str, ...]]:
    """All nodes, and that of each rank; waits for nodes, and for what an engine that has ended gives back."""
    deadline, reminder = time.monotonic() + seconds, 0.0
    while True:
        nodes = cluster_nodes()
        node_ids = place(wanted, nodes, own)
        if node_ids is not None:
            return nodes, node_ids
        lacking = _lacking(wanted, nodes)
        left = deadline - time.monotonic()
        if left <= 0:
            raise EngineOptionError(f"{_OPTION}: {lacking}")
        if time.monotonic() > reminder:
            progress.say(f"      waiting for room, {left:.0f} s at most: {lacking}")
            reminder = time.monotonic() + _REMIND_SECONDS
        time.sleep(min(left, _LOOK_SECONDS))


def _lacking(wanted: int, nodes: Sequence[RayNode]) -> str:
    key, names = device_key(), names_of(nodes)
    found = ", ".join(f"{names[node.id]} has {node.free} of {node.total} free" for node in nodes) or "no node has any"
    way_out = (
        f"start nodes with `ray start --resources '{{\"{CPU_RESOURCE}\": 1}}'`"
        if key == CPU_RESOURCE
        else "add nodes, or end what runs there"
    )
    return (
        f"{wanted} of the resource {key} are needed, one a rank (tensor_parallel_size, times the specialists with "
        f"placement: split), and {found}; {way_out}"
    )


def _versions() -> Callable[[], dict[str, str]]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(installed)
    return installed.installed_versions


def _ask(
    node_ids: Sequence[str],
    names: Mapping[str, str],
    function: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    progress: StartupProgress,
) -> dict[str, dict[str, Any]]:
    """What a function returns on each node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(max_calls=1, max_retries=0, num_cpus=0)(function)
    waiting = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            *arguments
        ): node_id
        for node_id in node_ids
    }
    answers: dict[str, dict[str, Any]] = {}
    reminder = time.monotonic() + _REMIND_SECONDS
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=_LOOK_SECONDS)
        for reference in done:
            node_id = waiting.pop(reference)
            try:
                answers[node_id] = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise EngineStartError(f"{_OPTION}: node {names[node_id]} failed: {reason}") from error
        if time.monotonic() > reminder:
            progress.say(f"      waiting for {', '.join(names[node_id] for node_id in waiting.values())}")
            reminder = time.monotonic() + _REMIND_SECONDS
    return answers


def _refuse(own: Mapping[str, str], theirs: Mapping[str, Mapping[str, str]], names: Mapping[str, str]) -> None:
    problems = [
        line for node_id, values in theirs.items() for line in differences(names[node_id], values, "the server's", own)
    ]
    if problems:
        raise EngineOptionError(f"{_OPTION}: {one_line(problems)}; make all nodes alike, and start again")


def _everywhere(fusion: str) -> str:
    """The fusion as other nodes may find it: a preset's name stays, a path does not hang on a working directory."""
    path = Path(fusion)
    return str(path.resolve()) if path.exists() else fusion
