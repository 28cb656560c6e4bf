"""Run `seft evaluate` as a script, for launchers that start one."""

from seft_dist.commands.evaluate import main

if __name__ == "__main__":
    main()
