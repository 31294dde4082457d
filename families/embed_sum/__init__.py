"""The sum of a cell's and a perturbation's encoding, read by an MLP."""
