"""What every node does before a weight is loaded: check the options, prepare the models, see whether they fit.

Importing this module imports vLLM. Starts no engine.
"""

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.server.engine.shared.node import Node, check_node
from ultrafuser.server.engine.shared.options import check_devices, check_engine_options, override_engine
from ultrafuser.server.engine.shared.ray_cluster import check_ray
from ultrafuser.server.serving.installation import VLLM_VERSION, allow_many_connections, device_name, tool_parsers
from ultrafuser.server.serving.thinking import check_parser
from ultrafuser.server.settings import TOOL_PARSERS, ServerSettings, SettingsError
from ultrafuser.server.start.progress import StartupProgress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A fusion that can be loaded on this machine."""

    written: FusionConfig
    """As it was written, with the engine options that were given."""

    fusion: FusionConfig
    """The same, its specialists plain model folders here."""

    info: FusedModelInfo
    """What it is made of."""

    engine_options: Mapping[str, Any]
    """Those that were given."""

    node: Node | None
    """Which of several machines this is; None if it is alone."""


def prepare(
    settings: ServerSettings, engine_options: Mapping[str, Any], fusion: FusionConfig, progress: StartupProgress
) -> Prepared:
    """Everything that can be wrong is wrong here.

    Raises:
        SettingsError, FusionError, GateError, EngineOptionError: the user can put it right.
    """
    python = platform.python_version()
    progress.say(f"vLLM {VLLM_VERSION}, torch {torch.__version__}, Python {python}, device {device_name()}")
    allow_many_connections()
    check_engine_options(fusion.engine.model_dump(exclude_none=True) | dict(engine_options))
    _check_tool_parser(settings.tool_call_parser or fusion.tool_call_parser, settings.enable_auto_tool_choice)
    written = override_engine(fusion, engine_options)
    node = _node(settings)
    if node is not None:
        check_node(written, node)
    elif not check_ray(written):
        check_devices(written)
    with progress.step("prepare weights"):
        fusion = materialize(written, Path(settings.cache) if settings.cache else None, progress.report)
        info = inspect_fusion(fusion)
    if (name := settings.reasoning_parser or fusion.reasoning_parser) is not None:
        check_parser(name, fusion, info)
    _log_configuration(settings, fusion, engine_options)
    return Prepared(written, fusion, info, engine_options, node)


def _node(settings: ServerSettings) -> Node | None:
    if settings.nnodes == 1:
        return None
    assert settings.master_addr is not None
    return Node(settings.node_rank, settings.nnodes, settings.master_addr, settings.master_port)


def _check_tool_parser(name: str | None, enable_auto: bool | None) -> None:
    parsers = tool_parsers()
    if name is not None and name not in parsers:
        raise SettingsError(f"tool_call_parser: vLLM has no parser {name!r}; it has {', '.join(parsers)}")
    if name is not None and name not in TOOL_PARSERS:
        known = ", ".join(TOOL_PARSERS)
        raise SettingsError(
            f"tool_call_parser: {name!r} is not supported, its answers could differ in a stream; choose one of {known}"
        )
    if enable_auto and name is None:
        raise SettingsError("--enable-auto-tool-choice: there is no parser; name one with --tool-call-parser")


def _log_configuration(settings: ServerSettings, fusion: FusionConfig, engine_options: Mapping[str, Any]) -> None:
    """What is served and how; keys are secret and templates long."""
    logger.info("settings: %s", settings.model_dump(exclude={"api_key"}, exclude_defaults=True))
    logger.info("engine: %s", fusion.engine.model_dump(exclude_none=True) | dict(engine_options))
    if (dict(engine_options).get("load_format") or fusion.engine.load_format) == "dummy":
        logger.warning("engine.load_format: dummy: weights are random, answers mean nothing; speed and memory are real")
    logger.info("sampling defaults: %s", fusion.sampling_defaults.model_dump(exclude_none=True))
    for specialist in fusion.specialists:
        logger.info("specialist: %s", specialist.model_dump(exclude_none=True, exclude={"chat_template"}))
