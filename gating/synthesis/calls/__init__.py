"""Asking a model: rates and budget, retries, checks of what comes back. Knows no data set."""
