"""Run all checks: `python -m deploy.checks`. A line for each; exit status 1 if one failed."""

import sys
import time

from deploy.checks.checks import CHECKS
from deploy.checks.tools import ROOT, Failed, NotRun


def main() -> int:
    """Run what can be run here, and say of the rest why it was not."""
    num_failed = 0
    for name, check in CHECKS.items():
        start = time.monotonic()
        try:
            check(ROOT)
        except NotRun as reason:
            print(f"not run  {name}: {reason}", flush=True)
        except Failed as error:
            num_failed += 1
            print(f"FAILED   {name}\n{error}", flush=True)
        else:
            print(f"ok       {name} ({time.monotonic() - start:.1f} s)", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
