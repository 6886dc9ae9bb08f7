"""TransformerLens: bridges over models, and how they are called."""
