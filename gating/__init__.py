"""The fused model as data and mathematics, and the commands that train, measure, show and feed it. Knows no servers,
requests or vLLM.

On the floor: `errors` (what a user can get wrong), `files`, `progress_bar`, and `train`, which launchers of processes
name. A room imports those to its left, and nothing to its right:

    templates < model < data < training, evaluation < analysis < synthesis;  commands < data

No room imports `training`. Inside, synthesis goes stages < settings < calls < dataset < make < command, and evaluation
sandbox, settings < benchmarks < command.
"""
