"""`ultrafuser data`: instruction data for the domains of a fusion, out of calls to a model. Does not train on it."""
