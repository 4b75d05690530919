"""The engine core's process: which blocks are cached, who is scheduled, who ends. Knows no tensors."""
