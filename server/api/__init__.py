"""The HTTP routes, one module per resource: they call vLLM's serving classes and answer. A leaf: no room imports it.

What a request may ask for was checked before (`server/requests/`).
"""
