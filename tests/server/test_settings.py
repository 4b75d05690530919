"""Settings come from the command line, else the environment, else the default; nothing wrong is passed over."""

import ast
from pathlib import Path

import pytest

from ultrafuser.server.settings import (
    SECTIONS,
    ServerSettings,
    SettingsError,
    read_environment,
    resolve_settings,
    vllm_environment,
)

NAMES = list(ServerSettings.model_fields)


def test_the_command_line_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = read_environment({"ULTRAFUSER_HOST": "0.0.0.0", "ULTRAFUSER_PORT": "9000"}, NAMES)
    settings = resolve_settings({"port": "9001"}, environment)
    assert (settings.host, settings.port, settings.fusion) == ("0.0.0.0", 9001, "demo")


def test_lists_are_separated_by_commas_in_the_environment() -> None:
    settings = resolve_settings({}, {"api_key": "first, second"})
    assert [key.get_secret_value() for key in settings.api_key] == ["first", "second"]


def test_an_unknown_variable_stops_the_start_and_the_right_one_is_suggested() -> None:
    with pytest.raises(SettingsError, match="ULTRAFUSER_PROT: there is no such setting; did you mean ULTRAFUSER_PORT"):
        read_environment({"ULTRAFUSER_PROT": "9000"}, NAMES)


def test_an_empty_variable_is_not_set() -> None:
    assert read_environment({"ULTRAFUSER_API_KEY": "", "ULTRAFUSER_NONSENSE": "", "HOME": "/"}, NAMES) == {}


def test_what_kubernetes_injects_for_a_service_is_no_setting() -> None:
    injected = {
        "ULTRAFUSER_SERVICE_HOST": "10.0.0.1",
        "ULTRAFUSER_SERVICE_PORT": "8000",
        "ULTRAFUSER_SERVICE_PORT_HTTP": "8000",
        "ULTRAFUSER_PORT": "tcp://10.0.0.1:8000",
        "ULTRAFUSER_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "ULTRAFUSER_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert read_environment(injected, NAMES) == {}


@pytest.mark.parametrize(
    ("flags", "environment", "source"),
    [
        ({"port": "many"}, {}, "--port: .*many"),
        ({"port": "70000"}, {}, "--port: .*70000"),
        ({}, {"port": "many"}, "ULTRAFUSER_PORT: .*many"),
        ({}, {"log_level": "loud"}, "ULTRAFUSER_LOG_LEVEL: .*loud"),
        ({"shutdown_timeout": "-1"}, {}, "--shutdown-timeout: .*-1"),
        ({}, {"allowed_host": "a.example,*b.example"}, r"ULTRAFUSER_ALLOWED_HOST: .*\*b\.example"),
    ],
)
def test_an_unusable_value_is_named_with_where_it_came_from(
    flags: dict[str, str], environment: dict[str, str], source: str
) -> None:
    with pytest.raises(SettingsError, match=source):
        resolve_settings(flags, environment)


@pytest.mark.parametrize("only", ["ssl_certfile", "ssl_keyfile"])
def test_a_certificate_needs_its_key_and_the_reverse(only: str) -> None:
    with pytest.raises(SettingsError, match="set both or none"):
        resolve_settings({only: "file.pem"}, {})


def test_cors_and_keys_are_off_and_only_this_machine_is_served_by_default() -> None:
    settings = ServerSettings()
    assert (settings.allowed_origin, settings.api_key, settings.host) == ((), (), "127.0.0.1")


def test_every_setting_is_documented_in_one_section() -> None:
    documented = [name for section in SECTIONS for name in section.model_fields]
    assert sorted(documented) == sorted(NAMES)
    for name, field in ServerSettings.model_fields.items():
        assert field.description, name


def test_vllm_is_quiet_unless_the_user_wants_to_hear_it() -> None:
    assert vllm_environment({}, "info")["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert vllm_environment({}, "debug")["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "VLLM_LOGGING_LEVEL" not in vllm_environment({"VLLM_LOGGING_LEVEL": "DEBUG"}, "info")


def test_only_commands_read_the_environment() -> None:
    readers = set()
    for path in Path("server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(str(path))
    # The commands hand their environment to settings.py, or to a process of theirs; the others set variables for vLLM's
    # and torch's processes, where the user has set none, and on a Ray cluster they read what a node, or Ray, was told.
    assert readers == {
        "server/__main__.py",
        "server/batch/command.py",
        "server/doctor/command.py",
        "server/doctor/measuring.py",
        "server/engine/__init__.py",
        "server/engine/core/ray_executor.py",
        "server/engine/core/split_executor.py",
        "server/engine/shared/ray_cluster.py",
        "server/start/following.py",
        "server/start/leading.py",
        "server/start/ray_meeting.py",
        "server/terminal/command.py",
    }
