"""One call that a run makes once: where it belongs, what it says, what its answer looks like. Asks nobody."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.gating.synthesis.stages.domain import Domain
from ultrafuser.gating.synthesis.stages.prompt import Prompt
from ultrafuser.gating.synthesis.stages.records import Message
from ultrafuser.gating.synthesis.stages.response_schemas import ResponseSchema


@dataclass(frozen=True)
class Task:
    """One call. Its id is a digest of its lineage; what a `Record` has too is the same here."""

    id: str
    stage: str
    domain: Domain

    parent: str
    """Id of the item it is made from."""

    meta_topic: str = ""
    sub_topic: str = ""

    prompt: Prompt | None = None
    """What is asked; None: the conversation itself is continued."""

    values: Mapping[str, Any] = field(default_factory=dict)

    schema: ResponseSchema | None = None
    """Of the answer; None: any text, which is a response."""

    messages: tuple[Message, ...] = ()
    """The conversation that is continued."""

    root: str = ""
    relation: str = ""
    is_complex: bool = False

    def render(self) -> list[dict[str, str]]:
        """The messages to be sent."""
        if self.prompt is None:
            guidance = {"role": "system", "content": self.domain.guidance}
            return [guidance, *(message.model_dump() for message in self.messages)]
        common = {name: getattr(self.domain, name) for name in ("description", "language", "limits")}
        topics = {"meta_topic": self.meta_topic, "sub_topic": self.sub_topic}
        text = self.prompt.render(**common, **topics, messages=self.messages, **self.values)
        return [{"role": "user", "content": text}]
