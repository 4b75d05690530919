#!/usr/bin/env python3
"""Asks the server in the same container one of its probes: `healthcheck [/health | /ready]`; exit status 0 or 1.

For images without curl. Uses the standard library alone, so that it answers while the server is busy.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 4


def main() -> int:
    """Say what the probe answers; 0 if it is a 200."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/health"
    port = os.environ.get("ULTRAFUSER_PORT") or "8000"
    has_tls = bool(os.environ.get("ULTRAFUSER_SSL_CERTFILE"))
    # The certificate is for the name that clients use, not for this machine's own.
    context = ssl._create_unverified_context() if has_tls else None
    # Nor is a proxy, which is for the outside, asked for this container's own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    url = f"{'https' if has_tls else 'http'}://127.0.0.1:{port}{path}"
    try:
        with opener.open(url, timeout=TIMEOUT_SECONDS) as response:
            print(response.read(200).decode(errors="replace"))
            return 0
    except urllib.error.HTTPError as error:
        print(f"{error.code}: {error.read(200).decode(errors='replace')}")
    except OSError as error:
        print(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
