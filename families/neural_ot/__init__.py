"""Neural optimal transport: a transformer over three tokens of one cell."""
