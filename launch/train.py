"""Run `seft train` as a script, for launchers that start one."""

from seft_dist.commands.train import main

if __name__ == "__main__":
    main()
