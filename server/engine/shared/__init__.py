"""What the engine's three processes share: the fused model's spec, its options, prompts, a step's record."""
