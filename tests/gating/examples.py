"""Thirty hand-written conversations, ten of each domain; one of each ten has three turns, one a system message."""

from pathlib import Path

CONVERSATIONS = Path(__file__).parent / "data" / "conversations.jsonl"
