"""Run `seft quickstart` as a script, for launchers that start one."""

from seft_dist.commands.quickstart import main

if __name__ == "__main__":
    main()
