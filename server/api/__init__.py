"""The HTTP routes, one module per resource. They check what vLLM would not and call its serving classes."""
