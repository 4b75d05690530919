"""Responses over chat completions: items become messages, tools become functions, and the chat's stream becomes items
and events.

vLLM's own class for this route is not used: a chat completion is what is asked of it here, so that constraints, limits,
cache salts, weights, tool calls and whatever the chat will learn act by themselves, and one conversation has one prompt
on both routes. Of a response nothing is stored. Knows no routes, no prompts and no tokens.
"""
