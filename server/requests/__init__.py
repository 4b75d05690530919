"""What a request may say: its body, its bounds, what is not fused, its constraint; one check of it all before a route.

Knows request models, neither routes in particular nor the engine.
"""
