"""Trains a fused model under a launcher of processes, which names a module:
`torchrun --nproc-per-node 8 -m gating.train FUSION ...`. The command is `gating/training/command.py`."""

import sys

from ultrafuser.gating.training.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
