"""Run `seft plan` as a script, for launchers that start one."""

from seft_dist.commands.plan import main

if __name__ == "__main__":
    main()
