"""Ridge regression of the mean change on the perturbation."""
