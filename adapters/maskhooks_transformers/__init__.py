"""Hugging Face transformers for maskhooks: the sites of its models, and what their heads predict."""
