"""The process and its machine: ranks, signals, precision, provenance."""
