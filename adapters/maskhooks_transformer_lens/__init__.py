"""TransformerLens for maskhooks: the sites of its bridges, and how to call them."""
