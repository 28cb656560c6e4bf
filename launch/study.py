"""Run `seft study` as a script, for launchers that start one."""

from seft_dist.commands.study import main

if __name__ == "__main__":
    main()
