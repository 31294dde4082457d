"""The control cell plus the mean change of its perturbation."""
