"""Explainers: methods that combine sites, gates, baselines, probes and objectives."""
