"""An example plugin for maskhooks: sites of `Pyramid` models, a gate that rounds, and scores from gradients."""
