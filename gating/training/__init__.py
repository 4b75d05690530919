"""`ultrafuser train` and `remove`: learners, losses, balanced sampling, sharding, newcomers, results. Knows no
evaluation but its own loss."""
