"""Search for the smallest sets of positions that leave a prediction unchanged."""
