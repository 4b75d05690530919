"""The events of a response's stream, read as they are sent."""

import json
from typing import Any


def parsed(text: str) -> list[dict[str, Any]]:
    """All events, each of whose names is its type."""
    found = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found
