"""Run each from the repository's root, for example `python -m examples.own_model`."""
