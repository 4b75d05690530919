"""What a response has to follow: JSON Schemas rewritten into what the grammar library keeps, and grammars compiled.

The same code in the engine and in the process that tries a constraint out, so that both decide alike. Knows the
grammar library; knows no requests and no vLLM.
"""
