"""What all processes of the engine share: spec and options, what travels with a request, what comes back with a step.

Knows names, numbers and arrays; imports none of the other rooms, so that each process loads its own alone.
"""
