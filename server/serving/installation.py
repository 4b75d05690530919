"""vLLM as it is installed and set up in this process: its version, its device, its parsers, its connections."""

from vllm.platforms import current_platform
from vllm.tool_parsers import ToolParserManager
from vllm.utils.system_utils import set_ulimit
from vllm.version import __version__ as VLLM_VERSION

__all__ = ["VLLM_VERSION", "allow_many_connections", "device_name", "tool_parsers"]


def device_name() -> str:
    """A GPU's own name, else the kind of device."""
    name: str = current_platform.get_device_name() if current_platform.is_cuda() else current_platform.device_type
    return name


def tool_parsers() -> list[str]:
    """Names of vLLM's parsers for tool calls."""
    names: list[str] = ToolParserManager.list_registered()
    return names


def allow_many_connections() -> None:
    """Raise this process's limit of open files: every connection is one."""
    set_ulimit()
