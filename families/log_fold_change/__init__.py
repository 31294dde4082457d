"""The control cell times the geometric mean fold change of its perturbation."""
