"""The control cell plus the sum of the single changes."""
