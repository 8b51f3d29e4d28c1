"""Training: recipes, losses and the two trainers. Needs `pip install hydra_hf[train]`."""
