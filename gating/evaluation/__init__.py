"""`ultrafuser eval`: losses on held-out data, and generation benchmarks through a running server. Does not train."""
