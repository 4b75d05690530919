"""`ultrafuser train`: learners, losses, balanced sampling, sharding, results. Knows no evaluation but its own loss."""
