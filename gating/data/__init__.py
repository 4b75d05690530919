"""Conversations to tensors: files and data sets of the hub, cleaned; encoding for every specialist; batches; cached
hidden states. Knows no loss."""
