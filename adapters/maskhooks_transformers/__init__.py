"""Hugging Face transformers for maskhooks: sites of its models, and what their heads predict."""
