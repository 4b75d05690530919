"""The engine in the API process: requests enter here, tokens, weights and step reports arrive. Computes no tensors."""
