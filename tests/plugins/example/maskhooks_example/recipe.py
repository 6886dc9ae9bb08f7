"""A recipe of the plugin's own parts."""

from __future__ import annotations

from maskhooks import Recipe


def recipe() -> Recipe:
    """Called by the hook, when the parts that it names are registered."""
    return Recipe(
        name="example",
        description="For small models: a linear probe, moved by the signs of gradients.",
        steps=200,
        learning_rate=0.02,
        warmup_steps=10,
        probe="linear",
        objective={"name": "exponentiated", "rate": 0.05},
        penalty="squared",
        optimizer="sign-sgd",
    )
