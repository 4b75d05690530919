"""Tests, laid out like the packages they test; `tests.fakes` holds the tiny fused model they share."""
