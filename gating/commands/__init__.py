"""What commands share: flags out of settings, progress, provenance, run folders, asking a server. Knows no model."""
