"""Build, cache, operators, autograd, devices. Nothing here knows what a pattern means."""
