"""Run `seft export` as a script, for launchers that start one."""

from seft_dist.commands.export import main

if __name__ == "__main__":
    main()
