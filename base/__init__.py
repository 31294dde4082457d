"""What every model shares. The modules that a model or its processor imports travel with a checkpoint."""
