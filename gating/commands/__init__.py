"""What commands share: flags out of settings, provenance, run folders, asking a server. Knows no model, no command."""
