"""The State transition model: its configuration and model stand at the root, its objective and card here."""
