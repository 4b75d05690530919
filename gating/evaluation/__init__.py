"""`ultrafuser eval`: losses on held-out data, and generation benchmarks through a running server. Trains nothing."""
