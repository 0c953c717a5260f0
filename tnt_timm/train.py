"""Train as a module: `torchrun -m tnt_timm.train --config tnt_s`."""

from tnt_timm.commands.train import main

if __name__ == "__main__":
    raise SystemExit(main())
