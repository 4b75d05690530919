"""The fused model as data and mathematics, and the commands that train, measure, show and feed it. Knows no servers,
requests or vLLM.

On the floor: `errors` (what a user can get wrong), `files`, `progress_bar`, and `train`, which launchers of processes
name. A room imports those to its left, and nothing to its right:

    templates < model < data < training, evaluation < analysis < synthesis;  commands < data

No room imports `training`. Inside, synthesis goes stages < settings < calls < dataset < make < command, and evaluation
sandbox, settings < benchmarks < command.
"""

import sys

if __name__ == "gating":  # found as a folder at the repository's top, where `python -m gating.train` is typed

    class _OneName:
        """Every other module has one name, ultrafuser.gating.NAME: under two it would exist twice."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name.startswith("gating.") and name != "gating.train":
                raise ImportError(f"{name} is imported as ultrafuser.{name}")

    sys.meta_path.insert(0, _OneName)
