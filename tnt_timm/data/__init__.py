"""Data sets by name, their transforms, and batches on the device."""
