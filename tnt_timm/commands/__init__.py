"""One file per command that a person types."""
