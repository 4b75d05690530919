"""The engine core's process: which blocks are cached, who is scheduled, who ends, what a step's outputs carry.

Knows token ids and block ids, no tensors.
"""
