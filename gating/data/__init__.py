"""Conversations to tensors: files, encoding for every specialist, batches, cached hidden states. Knows no loss."""
