"""vLLM's serving classes, wired for a fused model: rendering, the gate's weights in responses, the API's schema.

Beside the engine the only room that knows vLLM: its entrypoint classes and protocol models. Knows no routes.
"""
