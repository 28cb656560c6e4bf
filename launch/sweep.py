"""Run `seft sweep` as a script, for launchers that start one."""

from seft_dist.commands.sweep import main

if __name__ == "__main__":
    main()
