"""Explainers: recipes over sites, gates, baselines, probes and objectives."""
