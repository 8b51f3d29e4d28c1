"""One module a paper, one function a recipe. `hydra train MODULE.FUNCTION` runs it."""
