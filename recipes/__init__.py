"""Recipes: one script per stage to copy and edit, run by `disranker STAGE` or `accelerate launch`."""
