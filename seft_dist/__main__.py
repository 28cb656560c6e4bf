"""The command `seft` as a module, for launchers: torchrun -m seft_dist train ..."""

from seft_dist.commands.main import main

if __name__ == "__main__":
    main()
