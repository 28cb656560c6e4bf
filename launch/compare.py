"""Run `seft compare` as a script, for launchers that start one."""

from seft_dist.commands.compare import main

if __name__ == "__main__":
    main()
