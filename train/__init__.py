"""Data-parallel training of PWC-Net: recipes, the step, the loop, checkpoints, curves."""
