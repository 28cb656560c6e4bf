"""Run `seft reproduce` as a script, for launchers that start one."""

from seft_dist.commands.reproduce import main

if __name__ == "__main__":
    main()
