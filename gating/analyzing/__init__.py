"""What a gate does, as numbers, pictures and a page. The command is `gating/analysis.py`."""
