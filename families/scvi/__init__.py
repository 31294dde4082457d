"""scVI: a conditional variational autoencoder on counts."""
