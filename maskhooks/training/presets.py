"""The built-in recipes."""

from __future__ import annotations

from maskhooks.training.recipe import Recipe


def presets() -> dict[str, Recipe]:
    """Return the recipes by name."""
    recipes = (
        Recipe(description="The default, for models that predict with confidence."),
        Recipe(
            name="language",
            description="For pretrained language models, whose predictions depend a little on nearly every position.",
            steps=480,
            batch_size=8,
            warm_start_batches=240,
            least_gain=0.005,
            optimizer={"name": "adam", "beta1": 0.95, "beta2": 0.999},
            objective={"name": "ratio", "rate": 0.01, "power": 2.0, "ema_decay": 0.95, "target_fraction": 0.92},
            min_logit=-3.0,
            l0_price=0.05,
            flip_penalty=1.0,
            balance=True,
            layer_warmup=0.6,
            learning_rate=1.5e-3,
            baseline_learning_rate=0.05,
            baseline_steps=0,
            validations=4,
            calibrations=3,
            sharpness=4.0,
        ),
        Recipe(
            name="graph",
            description="For messages of graph networks (GraphMask).",
            steps=600,
            learning_rate=2e-3,
            probe="summed",
            layer_warmup=0.5,
        ),
        Recipe(
            name="subset",
            description="For per-example logits that search for the smallest set of positions.",
            steps=100,
            warmup_steps=10,
            restarts=16,
            logit_learning_rate=1.0,
            logit_init=-1.0,
            logit_init_std=2.0,
            adam_beta2=0.9,
            min_logit=-5.0,
            initial_temperature=5.0,
        ),
        Recipe(
            name="paper",
            description="The settings of DiffMask's authors.",
            learning_rate=3e-4,
            baseline_learning_rate=1e-3,
            baseline_steps=0,
            warmup_steps=200,
            decay_fraction=0.0,
            optimizer="lookahead",
            probe="paper",
            objective="paper",
        ),
    )
    return {recipe.name: recipe for recipe in recipes}
