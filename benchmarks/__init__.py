"""One script per question; each compares the fused engine with a baseline that runs in the same script.

`python -m benchmarks.NAME` measures, `--quick` only shows that it works, `python -m benchmarks.report` writes
docs/results.md out of what was measured.
"""
