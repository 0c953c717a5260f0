"""Settings: their schema, and how YAML files and command lines become validated objects."""
