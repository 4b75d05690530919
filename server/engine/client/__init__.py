"""The engine in the API process: requests enter here; tokens, weights and step reports arrive. Computes no tensors.

Knows neither scheduler nor workers: they run in other processes, and vLLM carries what goes between.
"""
