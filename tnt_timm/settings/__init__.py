"""The schema of all settings, and how YAML and command line become one validated object."""
