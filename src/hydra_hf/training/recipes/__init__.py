"""A module for each paper, a function for each recipe. `hydra train MODULE.FUNCTION` runs it."""
