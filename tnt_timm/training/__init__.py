"""Training and validation: config, build, trainer (the loop), evaluation, checkpointing, distributed, reporting."""
