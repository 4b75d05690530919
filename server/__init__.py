"""The serving side: the `ultrafuser` command, the HTTP API and the fused engine. Never imported by `gating`."""
