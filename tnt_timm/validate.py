"""Validate as a module: `python -m tnt_timm.validate output/tnt_s`."""

from tnt_timm.commands.validate import main

if __name__ == "__main__":
    raise SystemExit(main())
