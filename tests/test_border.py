"""Where vLLM is known: in the engine and in the serving room; elsewhere only models of requests, by name."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

ROOMS = ("server/engine/", "server/serving/")
"""They may import whatever vLLM has."""

REQUEST_MODELS = {
    "vllm.entrypoints.anthropic.protocol.AnthropicCountTokensRequest",
    "vllm.entrypoints.anthropic.protocol.AnthropicMessagesRequest",
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest",
    "vllm.entrypoints.serve.tokenize.protocol.DetokenizeRequest",
    "vllm.entrypoints.serve.tokenize.protocol.TokenizeChatRequest",
    "vllm.entrypoints.serve.tokenize.protocol.TokenizeCompletionRequest",
    "vllm.entrypoints.serve.tokenize.protocol.TokenizeRequest",
    "vllm.renderers.chat_utils.ChatCompletionMessageParam",
}
"""What a route or a check may name in its signature."""


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_vllm(folder: str) -> dict[str, set[str]]:
    """What each file of a folder, by its path, imports from vLLM; files that import nothing of it are left out."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = {name for name in imported(path) if name.split(".")[0] == "vllm"}
        if names:
            found[path.relative_to(ROOT).as_posix()] = names
    return found


def test_the_server_knows_vllm_in_two_rooms_and_its_request_models_elsewhere() -> None:
    elsewhere = {path: names for path, names in of_vllm("server").items() if not path.startswith(ROOMS)}
    assert {path: names - REQUEST_MODELS for path, names in elsewhere.items() if names - REQUEST_MODELS} == {}
    assert {name for names in elsewhere.values() for name in names} == REQUEST_MODELS


def test_request_models_are_known_where_requests_are() -> None:
    elsewhere = {path for path in of_vllm("server") if not path.startswith(ROOMS)}
    assert {path for path in elsewhere if not path.startswith(("server/requests/", "server/api/"))} == set()


def test_gating_knows_no_vllm() -> None:
    assert of_vllm("gating") == {}


def test_imports_are_seen_wherever_they_are(tmp_path: Path) -> None:
    source = "import vllm\nfrom vllm.v1 import engine as e\n\ndef f():\n    from vllm import LLM\n    import os.path\n"
    (tmp_path / "module.py").write_text(source)
    assert set(imported(tmp_path / "module.py")) == {"vllm", "vllm.v1.engine", "vllm.LLM", "os.path"}
