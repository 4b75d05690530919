"""vLLM's serving classes, wired for a fused model: our renderer, our errors, our names. Knows no routes.

They are used as they are, but for four things: they put their own error object into a stream, where ours must be, they
know nothing of weights and drafts, they would give the engine constraints that hold it up, and they read a tool call
out of a stream and out of a whole answer in two ways.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NoReturn

from fastapi import Request
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatMessage,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput
from vllm.parser.metrics import init_parser_metrics
from vllm.renderers.online_renderer import OnlineRenderer

from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.access.keys import salt_cache
from ultrafuser.server.engine.shared.spec import EngineSpec
from ultrafuser.server.errors import ApiError
from ultrafuser.server.requests.context import cut_to_room
from ultrafuser.server.requests.grammars import GrammarCheck
from ultrafuser.server.requests.limits import RequestBounds
from ultrafuser.server.requests.mark_fields import asked_marks
from ultrafuser.server.serving.anthropic_messages import AsMessages
from ultrafuser.server.serving.constraints import (
    constraint_in,
    constraint_of,
    constraints_of_tools,
    demands_call,
    held_to_tools,
    keep_parameters,
    leading_vocabulary,
)
from ultrafuser.server.serving.fingerprint import fingerprint
from ultrafuser.server.serving.rendering import OPENING, FusedRenderer
from ultrafuser.server.serving.responses.answering import FusedServingResponses
from ultrafuser.server.serving.thinking import Markers
from ultrafuser.server.serving.thoughts import tell_apart, thoughtful
from ultrafuser.server.serving.token_marks import MarksInEvents, add_to_choices
from ultrafuser.server.serving.tool_calls import finish_reason, read_alike
from ultrafuser.server.serving.translation import as_api_error, error_in
from ultrafuser.server.settings import ServerSettings


class _Fused:
    """What both kinds of completions have.

    Raises what vLLM's stream generators would write into the stream; `server/api/response.py` decides where it goes.
    """

    specialists: Sequence[str] = ()
    grammars: GrammarCheck

    def create_streaming_error_response(
        self,
        message: str | Exception,
        err_type: str = "BadRequestError",
        status_code: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
    ) -> NoReturn:
        if isinstance(message, Exception):
            raise as_api_error(message) from message
        raise as_api_error(self.create_error_response(message, err_type, status_code, param))  # type: ignore[attr-defined]

    def _fit(self, request: ChatCompletionRequest | CompletionRequest, inputs: Sequence[Any]) -> None:
        """Cut the request to the room that its prompts leave; of several the longest decides."""
        longest = max(len(engine_input["prompt_token_ids"]) for engine_input in inputs)
        cut_to_room(request, self.model_config.max_model_len - longest)  # type: ignore[attr-defined]

    def _convert_generation_error_to_streaming_response(self, e: GenerationError) -> NoReturn:
        raise as_api_error(e) from e


class FusedServingChat(_Fused, OpenAIServingChat):
    """vLLM's chat completions, with what is told of each token for those who ask."""

    markers: Markers | None = None
    """Of thoughts, if they are told apart."""

    def _create_chat_message(self, **fields: Any) -> ChatMessage:
        message = super()._create_chat_message(**fields)
        if message.reasoning is not None:
            message.reasoning_content = message.reasoning
        return message

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        # A call that is demanded takes the place of every other form.
        own = None if demands_call(request) else constraint_in(request)
        for constraint in (own, *constraints_of_tools(request)):
            await self.grammars.check(constraint)
        await asyncio.to_thread(keep_parameters, request)
        rendered = await super().render_chat_request(request)
        if isinstance(rendered, ErrorResponse):
            return rendered
        self._fit(request, rendered[1])
        if self.markers is not None:
            tell_apart(request, rendered[1][0][OPENING], self.markers)
        # Rendering has turned tools into a constraint; a part of it that has passed is not tried again.
        await self.grammars.check(constraint_of(request.extract_structured_outputs(), "tools"))
        return rendered

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | ChatCompletionResponse | ErrorResponse:
        if raw_request is not None:
            salt_cache(request, raw_request.state)
        return await super().create_chat_completion(request, raw_request)

    def chat_completion_stream_generator(
        self, request: ChatCompletionRequest, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        base = super().chat_completion_stream_generator
        if not asked_marks(request):
            return base(request, result_generator, *args, **kwargs)
        marks = MarksInEvents(request, self.specialists)
        return marks.decorated(base(request, marks.watch(result_generator), *args, **kwargs))

    async def chat_completion_full_generator(
        self, request: ChatCompletionRequest, result_generator: Any, *args: Any, **kwargs: Any
    ) -> ErrorResponse | ChatCompletionResponse:
        last: list[RequestOutput] = []

        async def watched() -> AsyncGenerator[RequestOutput, None]:
            async for output in result_generator:
                last[:] = [output]
                yield output

        response = await super().chat_completion_full_generator(request, watched(), *args, **kwargs)
        if isinstance(response, ChatCompletionResponse):
            for choice, output in zip(response.choices, last[0].outputs, strict=True):
                choice.finish_reason = finish_reason(request, choice, output)
            add_to_choices(request, response, self.specialists, last[0].outputs)
        return response


class FusedServingMessages(AsMessages, FusedServingChat):
    """The same, in Anthropic's words."""


class FusedServingCompletion(_Fused, OpenAIServingCompletion):
    """vLLM's completions, with what is told of each token for those who ask."""

    async def render_completion_request(self, request: CompletionRequest) -> Any:
        await self.grammars.check(constraint_in(request))
        rendered = await super().render_completion_request(request)
        if not isinstance(rendered, ErrorResponse):
            self._fit(request, rendered)
        return rendered

    async def create_completion(
        self, request: CompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | CompletionResponse | ErrorResponse:
        if raw_request is not None:
            salt_cache(request, raw_request.state)
        return await super().create_completion(request, raw_request)

    def completion_stream_generator(
        self, request: CompletionRequest, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        base = super().completion_stream_generator
        if not asked_marks(request):
            return base(request, engine_inputs, result_generator, *args, **kwargs)
        prompts = [self._extract_prompt_text(engine_input) for engine_input in engine_inputs]
        marks = MarksInEvents(request, self.specialists, prompts)
        return marks.decorated(base(request, engine_inputs, marks.watch(result_generator), *args, **kwargs))

    def request_output_to_completion_response(
        self, final_res_batch: list[RequestOutput], request: CompletionRequest, *args: Any, **kwargs: Any
    ) -> CompletionResponse:
        response = super().request_output_to_completion_response(final_res_batch, request, *args, **kwargs)
        completions = [own for output in final_res_batch for own in output.outputs]
        add_to_choices(request, response, self.specialists, completions)
        return response


class _PlainRenderer(OnlineRenderer):
    """vLLM's request code over our renderer, whoever leads.

    If GPT-OSS does, vLLM writes a prompt by itself, past every renderer and for one model only, and reads answers in
    the same format (Harmony). It decides that with this attribute, before it chooses its parser.
    """

    @property
    def use_harmony(self) -> bool:
        return False

    @use_harmony.setter
    def use_harmony(self, is_gpt_oss: bool) -> None:
        pass


@dataclass(frozen=True)
class Serving:
    """Everything the routes call."""

    engine: EngineClient
    models: OpenAIServingModels
    chat: FusedServingChat
    messages: FusedServingMessages
    completion: FusedServingCompletion
    responses: FusedServingResponses
    tokenization: ServingTokenization
    tokenizer: Any
    """The leader's; it gives text the ids that all specialists share."""
    specialists: tuple[str, ...]
    grammars: GrammarCheck
    bounds: RequestBounds


def build_serving(
    engine: EngineClient, fusion: FusionConfig, info: FusedModelInfo, settings: ServerSettings
) -> Serving:
    """Wire vLLM's serving classes over a running engine; `fusion` is the materialized one."""
    names = settings.served_model_name or (fusion.name,)
    # The second name is shown to clients as `root`; vLLM puts a path of the server's disk there.
    models = OpenAIServingModels(engine, [BaseModelPath(name, fusion.name) for name in names])
    parser = settings.tool_call_parser or fusion.tool_call_parser
    if parser:
        init_parser_metrics(model_name=names[0])
    is_auto = bool(parser) if settings.enable_auto_tool_choice is None else settings.enable_auto_tool_choice
    template: dict[str, Any] = {"chat_template": None, "chat_template_content_format": "auto", "request_logger": None}
    config = engine.vllm_config
    reasoning_parser = settings.reasoning_parser or fusion.reasoning_parser
    fused_renderer = FusedRenderer(config, fusion, info, reasoning_parser)
    renderer = _PlainRenderer(
        engine.model_config, fused_renderer, **template, tool_parser=parser, enable_auto_tools=is_auto
    )
    shared: dict[str, Any] = {"online_renderer": renderer, "enable_prompt_tokens_details": True}
    chats: dict[str, Any] = {
        **shared,
        **template,
        "enable_auto_tools": is_auto,
        "reasoning_parser": reasoning_parser or "",
    }
    chat = FusedServingChat(engine, models, "assistant", **chats)
    messages = FusedServingMessages(engine, models, "assistant", **chats)
    completion = FusedServingCompletion(engine, models, request_logger=None, **shared)
    grammars = GrammarCheck(leading_vocabulary(config), settings.grammar_timeout)
    answers = None
    if renderer.parser is not None:
        answers = read_alike(renderer.parser, fused_renderer.tokenizer)
        renderer.parser = held_to_tools(renderer.parser)
    if fused_renderer.markers is not None:
        answers = thoughtful(answers, fused_renderer.markers)
    for serving in (chat, messages):
        serving.parser_cls, serving.markers = answers, fused_renderer.markers
    dtypes = [specialist.dtype for specialist in EngineSpec.from_vllm_config(config).specialists]
    for serving in (chat, messages, completion):
        serving.grammars = grammars
        serving.specialists = fusion.specialist_names
        serving.system_fingerprint = fingerprint(fusion, dtypes)
        # vLLM takes the server's max_tokens for a cap, too; in the fusion file it is a default.
        serving.override_max_tokens = None
    tokenization = ServingTokenization(models, renderer, **template)
    bounds = RequestBounds(
        limits=settings,
        max_logprobs=config.model_config.max_logprobs,
        has_priorities=config.scheduler_config.policy == "priority",
        num_shared_ids=info.num_shared_ids,
        context_length=config.model_config.max_model_len,
        tells_thoughts=reasoning_parser is not None,
    )
    messages.bounds = bounds
    tokenizer, specialists = fused_renderer.tokenizer, fusion.specialist_names
    responses = FusedServingResponses(chat, bounds)
    return Serving(
        engine, models, chat, messages, completion, responses, tokenization, tokenizer, specialists, grammars, bounds
    )


async def warm_up(serving: Serving) -> None:
    """Have one token generated, from messages to text.

    Raises:
        ApiError: the engine failed.
    """
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
    result = await serving.chat.create_chat_completion(request)
    if (error := error_in(result)) is not None:
        raise error
    assert isinstance(result, ChatCompletionResponse)
    if result.usage.completion_tokens != 1:
        raise ApiError("the engine produced no token")
