"""Bodies of /v1/messages and of what counts its tokens: vLLM's models of Anthropic's API, and what is refused of them.

Which fields a request may have, and in which form its body is read. What the conversation that it becomes may ask for
is checked like any other conversation. Knows requests, no routes.
"""

from pydantic import ConfigDict
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest

from ultrafuser.server.requests.blocks import plain_messages
from ultrafuser.server.requests.bodies import BodyForm
from ultrafuser.server.requests.checks import check_request
from ultrafuser.server.requests.limits import RequestBounds
from ultrafuser.server.requests.unsupported import MESSAGES_REFUSALS, notice_unknown_fields, refuse

ANTHROPIC_FORM = BodyForm(
    wide_fields=frozenset({"messages", "system", "tools", "output_config", "chat_template_kwargs"}),
    plain=plain_messages,
)
"""Bodies of both routes."""


class MessagesRequest(AnthropicMessagesRequest):
    """A conversation to be answered."""

    model_config = ConfigDict(extra="allow")


class CountTokensRequest(AnthropicCountTokensRequest):
    """A conversation whose prompt is to be measured."""

    model_config = ConfigDict(extra="allow")


@check_request.register(MessagesRequest)
@check_request.register(CountTokensRequest)
def _check_messages(request: MessagesRequest | CountTokensRequest, _bounds: RequestBounds) -> None:
    refuse(MESSAGES_REFUSALS, request)
    notice_unknown_fields(request)
