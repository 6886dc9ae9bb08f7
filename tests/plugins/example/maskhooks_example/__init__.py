"""An example plugin for maskhooks: sites of `Pyramid` models, and a gate that rounds."""
