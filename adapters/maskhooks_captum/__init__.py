"""Captum for maskhooks: Captum's methods as explainers at any site, and our explainers as Captum's attributions."""
