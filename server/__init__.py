"""The serving side: the `ultrafuser` command, the HTTP API and the fused engine. Never imported by `gating`."""

if __name__ != "ultrafuser.server":  # found as a folder at the repository's top: every module would exist twice
    raise ImportError("server is imported as ultrafuser.server")
