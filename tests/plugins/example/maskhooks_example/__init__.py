"""An example plugin for maskhooks: a part of each kind, and the `Pyramid` models that they serve."""
