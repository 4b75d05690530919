"""Evaluation: losses on held-out data, and generation benchmarks through a running server. Knows no training."""
