"""Which node of a Ray cluster gets which ranks, and what of the server's own goes there; no Ray is needed to know."""

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.fakes import write_tiny_fusion
from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from ultrafuser.server.engine.core.split_executor import SplitExecutor
from ultrafuser.server.engine.shared import ray_cluster
from ultrafuser.server.engine.shared.node import num_ranks
from ultrafuser.server.engine.shared.options import (
    RAY_EXECUTOR,
    EngineOptionError,
    check_devices,
    check_engine_options,
    engine_arguments,
    override_engine,
)
from ultrafuser.server.engine.shared.ray_cluster import (
    RayNode,
    RayPlacement,
    carried_variables,
    check_ray,
    connect,
    names_of,
    place,
)
from ultrafuser.server.engine.shared.spec import ADDITIONAL_CONFIG_KEY, EngineSpec

RAY = {"distributed_executor_backend": "ray"}


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> FusionConfig:
    """Three specialists."""
    return load_fusion(write_tiny_fusion(tmp_path_factory.mktemp("ray")))


def nodes(*free: int) -> list[RayNode]:
    """Nodes "0", "1", ..., in the order in which vLLM hands out ranks, with so many free devices each."""
    return [RayNode(str(rank), f"10.0.0.{rank}", count, 8) for rank, count in enumerate(free)]


@pytest.mark.parametrize(
    ("wanted", "free", "expected"),
    [
        (2, (2, 2), "00"),  # this machine's first
        (3, (1, 1, 2), "022"),  # then as few as can be
        (3, (0, 1, 2), "122"),  # ranks in vLLM's order of nodes, not in the order of choice
        (2, (0, 1, 1), "12"),
        (2, (1, 0, 0), None),
        (1, (), None),
    ],
)
def test_ranks_go_to_this_machine_and_then_to_as_few_nodes_as_can_be(
    wanted: int, free: tuple[int, ...], expected: str | None
) -> None:
    found = place(wanted, nodes(*free), "0")
    assert found == (None if expected is None else tuple(expected))


def test_nodes_of_one_machine_are_told_apart() -> None:
    one, other = RayNode("a" * 56, "10.0.0.1", 1, 1), RayNode("b" * 56, "10.0.0.1", 1, 1)
    assert names_of([one, other]) == {one.id: "10.0.0.1 (aaaaaaaa)", other.id: "10.0.0.1 (bbbbbbbb)"}
    assert names_of([one]) == {one.id: "10.0.0.1"}


def test_no_key_and_nothing_of_one_machine_goes_to_others() -> None:
    environ = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_LOGS": "-all",
        "NCCL_DEBUG": "INFO",
        "PYTHONWARNINGS": "ignore",
        "ULTRAFUSER_API_KEY": "secret",
        "HF_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "VLLM_API_KEY": "secret",
        "VLLM_HOST_IP": "10.0.0.1",
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "eth7",
        "HOME": "/root",
    }
    assert set(carried_variables(environ)) == {"VLLM_LOGGING_LEVEL", "TORCH_LOGS", "NCCL_DEBUG", "PYTHONWARNINGS"}


@pytest.mark.parametrize("engine", [RAY, RAY | {"placement": "split"}, RAY | {"tensor_parallel_size": 2}])
def test_both_placements_take_the_executor_for_ray(engine: dict[str, Any], fusion: FusionConfig) -> None:
    check_engine_options(engine)
    arguments = engine_arguments(fusion, inspect_fusion(fusion), engine)
    assert arguments["distributed_executor_backend"] == RAY_EXECUTOR
    assert num_ranks(override_engine(fusion, engine)) == (3 if "placement" in engine else len(engine))


def test_without_ray_the_refusal_names_the_extra(fusion: FusionConfig) -> None:
    asked = override_engine(fusion, RAY)
    with mock.patch.object(ray_cluster, "find_spec", return_value=None):
        with pytest.raises(EngineOptionError, match=r"ray: Ray is not installed; pip install 'ultrafuser\[ray\]'"):
            check_ray(asked)
        assert not check_ray(fusion)
    with mock.patch.object(ray_cluster, "find_spec", return_value=object()):
        assert check_ray(asked)


def test_offline_ray_is_refused(fusion: FusionConfig) -> None:
    with pytest.raises(EngineOptionError, match=r"^distributed_executor_backend: ray needs `ultrafuser serve`"):
        check_devices(override_engine(fusion, RAY))


def test_a_ray_clients_address_is_refused() -> None:
    with pytest.raises(EngineOptionError, match=r"^RAY_ADDRESS: ray://head:10001 is a Ray client's; run the"):
        connect("ray://head:10001", tells_workers_output=False)


def test_a_placement_travels_in_vllms_configuration_beside_the_spec(fusion: FusionConfig) -> None:
    arguments = engine_arguments(fusion, inspect_fusion(fusion), RAY)
    config: Any = SimpleNamespace(additional_config=arguments["additional_config"])
    spec = EngineSpec.from_vllm_config(config)
    placement = RayPlacement(address="10.0.0.1:6379", node_ids=("a", "b"), specs={"a": spec, "b": spec})
    placement.put_into(config)
    assert RayPlacement.from_vllm_config(config) == placement
    assert EngineSpec.from_vllm_config(config) == spec
    update = {"meeting_point": ("10.0.0.1", 1), "token": "t"}
    placement.model_copy(update=update).put_into(config)
    assert RayPlacement.from_vllm_config(config).meeting_point == ("10.0.0.1", 1)


def test_a_rank_takes_its_own_nodes_paths_and_the_rest_of_the_configuration(fusion: FusionConfig) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'ultrafuser[ray]'")
    from ultrafuser.server.engine.core.ray_executor import use_own_paths

    arguments = engine_arguments(fusion, inspect_fusion(fusion), RAY)
    there = EngineSpec.model_validate(arguments["additional_config"][ADDITIONAL_CONFIG_KEY])
    moved = tuple(item.model_copy(update={"model": f"/there/{item.name}"}) for item in there.specialists)
    own = there.model_copy(update={"specialists": moved, "gate": "/there/gate.safetensors"})
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(model=there.specialists[0].model, tokenizer=there.specialists[0].model),
        additional_config=arguments["additional_config"] | {"else": 1},
    )
    use_own_paths(config, own)
    leader = f"/there/{there.specialists[0].name}"
    assert (config.model_config.model, config.model_config.tokenizer) == (leader, leader)
    assert EngineSpec.from_vllm_config(config) == own
    assert config.additional_config["else"] == 1


def test_every_rank_of_a_node_has_a_core() -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'ultrafuser[ray]'")
    import torch

    from ultrafuser.server.engine.core import ray_executor

    with (
        mock.patch.object(ray_executor, "shares_of_cores", return_value="0,1|2,3"),
        mock.patch.object(os, "sched_setaffinity") as bind,
        mock.patch.object(torch, "set_num_threads") as threads,
        mock.patch.object(ray_executor, "envs", SimpleNamespace(VLLM_CPU_OMP_THREADS_BIND="auto")),
    ):
        ray_executor._take_cores(2, 1)
        assert bind.call_args.args == (0, [2, 3])
        assert threads.call_args.args == (2,)
        bind.reset_mock()
        ray_executor._take_cores(1, 0)
        assert not bind.called


def test_the_executor_for_ray_answers_by_the_leaders_first_rank_and_sends_no_variables() -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'ultrafuser[ray]'")
    from vllm.v1.executor import ray_executor_v2

    from ultrafuser.server.engine.core.ray_executor import RayExecutor

    executor = RayExecutor.__new__(RayExecutor)
    executor.parallel_config = SimpleNamespace(
        world_size=6, nnodes_within_dp=1, local_world_size=6, tensor_parallel_size=2, pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
    )  # fmt: skip
    assert ray_executor_v2.get_driver_env_vars(worker_specific_vars=set()) == {}, "vLLM would send all variables"
    assert executor._get_parallel_sizes() == (6, 1, 1)
    assert executor._get_output_rank() == SplitExecutor._get_output_rank(executor) == 0
