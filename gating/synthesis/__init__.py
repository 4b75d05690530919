"""`ultrafuser data`: instruction data for the domains of a fusion, out of calls to a model. See docs/data.md."""
