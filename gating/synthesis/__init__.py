"""Makes instruction data for the domains of a fusion out of calls to a model: `ultrafuser data`. See docs/data.md."""
