"""Generation benchmarks through a running server: items, answers, verdicts, scores. Knows no weights of a model."""
