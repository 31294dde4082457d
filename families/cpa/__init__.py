"""CPA: a compositional perturbation autoencoder."""
