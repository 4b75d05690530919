"""The server's settings, one docstring each, and the only place that reads the environment.

A setting comes from the command line, else from the environment (`ULTRAFUSER_` and the upper-case name), else from the
default below. The engine's options travel the same way; their defaults are in the fusion file. Knows no vLLM.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from ultrafuser.gating.commands.flags import resolve
from ultrafuser.gating.errors import CommandError
from ultrafuser.server.log import LogFormat

PREFIX = "ULTRAFUSER_"
LogLevel = Literal["debug", "info", "warning", "error"]

_VLLM_LEVELS: Mapping[LogLevel, str] = {"debug": "INFO", "info": "ERROR", "warning": "ERROR", "error": "ERROR"}

# Kubernetes describes a Service called "ultrafuser" to every pod under exactly these names.
_SERVICE_LINK = re.compile(rf"{PREFIX}(SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+)")


_TOOL_PARSERS = """
    apertus deepseek_v32 deepseek_v4 deepseek_v41 dots ernie45 functiongemma gemma4 gigachat3 glm45 glm47 granite
    granite-20b-fc granite4 hermes hunyuan_a13b inkling internlm k2_horizon kimi_k2 kimi_k3 ling3 llama4_pythonic
    longcat mimo minicpm5 minimax_m2 minimax_m3 muse_glimmer olmo3 phi4_mini_json plamo3 poolside_v1 pythonic
    qwen3_coder qwen3_json qwen3_xml seed_oss step3 step3p5 xlam
"""
TOOL_PARSERS = tuple(_TOOL_PARSERS.split())
"""vLLM's parsers whose answers are shown to be equal; the rest ask more of a tokenizer than the tests' has."""

SettingsError = CommandError
"""A setting is unknown or has an unusable value. One line: the name, the value, the way out."""


class EngineStartError(RuntimeError):
    """The engine's processes ended before they had answered; what they said about it is in the log."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Model(_Section):
    """What is served"""

    fusion: str = "demo"
    """The fusion file (YAML), a folder with a fusion.yaml, or a preset: demo, ultrafuser-13b, qwen2.5-7b,
    qwen3-30b-a3b."""

    served_model_name: tuple[str, ...] = ()
    """Name that clients send as `model` instead of the fusion file's; repeat for aliases, the first is reported."""

    tool_call_parser: str | None = None
    """vLLM's name of the parser that finds tool calls in a response, e.g. hermes; default: the fusion file's."""

    reasoning_parser: str | None = None
    """vLLM's name of the parser whose markers a thought has, e.g. qwen3; default: the fusion file's."""

    enable_auto_tool_choice: bool | None = None
    """Let the model decide whether to call a tool; default: on if there is a tool call parser."""

    cache: str | None = None
    """Folder for prepared weights (dequantised, merged adapters); default: ~/.cache/ultrafuser."""


class Network(_Section):
    """Where it listens"""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only; 0.0.0.0 is reachable from everywhere."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one and reports it."""

    root_path: str = ""
    """Path prefix that a reverse proxy strips before it passes requests on."""

    ssl_certfile: str | None = None
    """Certificate chain (PEM); set it together with the key to serve HTTPS."""

    ssl_keyfile: str | None = None
    """Private key (PEM) of the certificate."""

    shutdown_delay: Annotated[float, Field(ge=0)] = 0.0
    """Seconds after Ctrl-C or SIGTERM in which requests are still taken, while /ready says 503 to a balancer."""

    shutdown_timeout: Annotated[float, Field(ge=0)] = 5.0
    """Seconds that running requests get to finish after Ctrl-C or SIGTERM; a second signal ends them at once."""

    read_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds a client has to send a whole request; then its connection is closed."""

    write_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds a client may stop reading its response; then its connection is closed and its request ends."""

    keep_alive_interval: Annotated[float, Field(ge=0)] = 15.0
    """Seconds of silence after which a stream gets a comment (of /v1/messages a ping, after at most 10), so that no
    proxy gives it up; 0: never."""


class Nodes(_Section):
    """Several machines for one engine"""

    nnodes: Annotated[int, Field(ge=1)] = 1
    """Number of machines that run the one engine together, each with an equal share of its devices."""

    node_rank: Annotated[int, Field(ge=0)] = 0
    """Which of them this is: 0 listens for requests, the others compute for it."""

    master_addr: str | None = None
    """Address of node 0 by which the others reach it; the engine's network traffic stays on that interface."""

    master_port: Annotated[int, Field(ge=1, le=65534)] = 29501
    """Port of node 0 where the engine's processes meet; on the next one its nodes do, and stay connected."""

    node_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that nodes wait for each other at the start, their models prepared."""


class Access(_Section):
    """Who may use it"""

    api_key: tuple[SecretStr, ...] = ()
    """Key that clients must send as bearer token; repeat for several (environment: separate them by commas).
    /health, /ready, /metrics and the playground's page stay open: no prompt is in them."""

    api_key_file: str | None = None
    """File with more keys, one a line: other users of this machine can read a command line, but not a secret file."""

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Most requests that one key may send within any minute, refused with 429 beyond; default: no limit."""

    concurrent_requests: Annotated[int, Field(ge=1)] | None = None
    """Most requests of one key that may run at once, refused with 429 beyond; default: no limit."""

    cache_salt_per_key: bool = False
    """Let no key find blocks in the prefix cache that another key's requests have left there."""

    allowed_host: tuple[Annotated[str, Field(pattern=r"^(\*\.)?[^*\s]+$")], ...] = ()
    """Name that the Host header may have (*.example.com: every name below); repeat for several; default: any.
    Probes, metrics and the playground's page answer under every name."""

    allowed_origin: tuple[str, ...] = ()
    """Origin whose web pages may call the API from a browser (CORS); repeat for several, * for all; default: none."""

    playground: bool = True
    """Serve the playground page at /. It needs no key itself; what it asks of the API does."""


class Load(_Section):
    """How much it takes on"""

    request_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a request is ended with an error, whether it runs or waits; default: no limit."""

    stall_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a step of a busy engine after which it is stalled: /ready says 503, and what waits for it ends if
    its ranks wait for each other (`placement: split`, several nodes). More than the longest prefill step."""


class Limits(_Section):
    """What one request may ask for"""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**23
    """Longest request body in bytes; what is longer is answered with 413 and not read to its end."""

    max_items: Annotated[int, Field(ge=16)] = 2048
    """Most entries of any array or object in a request: messages, tools, prompts, biases; token ids are not counted."""

    max_responses: Annotated[int, Field(ge=1)] = 128
    """Most responses one request may ask for: `n` times the number of its prompts."""

    max_stop_chars: Annotated[int, Field(ge=1)] = 1000
    """Longest stop string in characters; a stream holds back as much text as the longest one has."""

    grammar_timeout: Annotated[float, Field(gt=0)] = 5.0
    """Seconds that compiling a structured output's schema, expression or grammar may take; 400 beyond."""


class Logs(_Section):
    """What it says"""

    log_level: LogLevel = "info"
    """Least important lines to show. Of vLLM's, only errors, unless this is debug or VLLM_LOGGING_LEVEL is set."""

    log_format: LogFormat = "text"
    """text, or json: one object a line. Lines of the engine's own processes (errors) stay text."""


class ServerSettings(Model, Network, Nodes, Access, Load, Limits, Logs):
    """Every setting of the server that is not an engine option."""


SECTIONS: tuple[type[_Section], ...] = (Model, Network, Nodes, Access, Load, Limits, Logs)
"""The sections in the order of `--help`; the docstring of each is its title."""


def resolve_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> ServerSettings:
    """Settings from command-line flags and environment values, both by setting name.

    Raises:
        SettingsError: a value does not fit; names the flag or variable it came from.
    """
    settings = resolve(ServerSettings, flags, environment, PREFIX)
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise SettingsError("--ssl-certfile and --ssl-keyfile: only one is set; set both or none")
    _check_nodes(settings)
    return settings


def _check_nodes(settings: ServerSettings) -> None:
    if settings.node_rank >= settings.nnodes:
        raise SettingsError(
            f"--node-rank: {settings.node_rank}, but ranks are 0 to {settings.nnodes - 1}; "
            "give each machine its own, or say with --nnodes how many there are"
        )
    if settings.nnodes > 1 and settings.master_addr is None:
        raise SettingsError("--master-addr: missing; name the address by which the other machines reach node 0")


def read_environment(environ: Mapping[str, str], known: Iterable[str]) -> dict[str, str]:
    """The `ULTRAFUSER_*` variables that are set and not empty, by lower-case setting name.

    Raises:
        SettingsError: a variable with the prefix is none of the known settings and engine options.
    """
    values: dict[str, str] = {}
    names = set(known)
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or not value or _is_service_link(variable, value):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {PREFIX}{near[0].upper()}?" if near else "unset it, see `ultrafuser serve --help`"
            raise SettingsError(f"{variable}: there is no such setting; {hint}")
        values[name] = value
    return values


def vllm_environment(environ: Mapping[str, str], log_level: LogLevel) -> dict[str, str]:
    """Variables to set before vLLM is imported; its own processes inherit them. What the user set stays as it is."""
    wanted = {
        "VLLM_LOGGING_LEVEL": _VLLM_LEVELS[log_level],
        # Each of the engine's processes would say that there is no Triton, how NUMA is bound, what torch renamed.
        "TORCH_LOGS": "-all",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # forking a process that has used torch or tokenizers can hang
        "VLLM_NO_USAGE_STATS": "1",
    }
    if log_level == "debug":
        wanted = {name: value for name, value in wanted.items() if name.startswith("VLLM_")}
    return {name: value for name, value in wanted.items() if name not in environ}


def _is_service_link(variable: str, value: str) -> bool:
    return _SERVICE_LINK.fullmatch(variable) is not None or (variable == PREFIX + "PORT" and "://" in value)
