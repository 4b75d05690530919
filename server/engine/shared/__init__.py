"""What all processes of the engine share: spec and options, what travels with a request, what comes back with a step.

Knows names, numbers and arrays, no tensors; imports none of the other rooms: each process loads its own alone.
"""
