"""The mean perturbed cell of a context."""
