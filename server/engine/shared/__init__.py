"""What the engine's processes share: the fused model's spec, options, prompts, a step's record. Computes no tensors."""
