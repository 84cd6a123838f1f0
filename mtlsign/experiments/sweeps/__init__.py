"""Hyperparameter sweeps over phase 2."""
