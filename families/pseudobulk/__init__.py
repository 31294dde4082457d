"""A transformer over the mean cell of a sentence."""
