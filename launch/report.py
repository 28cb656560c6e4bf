"""Run `seft report` as a script, for launchers that start one."""

from seft_dist.commands.report import main

if __name__ == "__main__":
    main()
