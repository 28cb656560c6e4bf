"""Run `seft prune` as a script, for launchers that start one."""

from seft_dist.commands.prune import main

if __name__ == "__main__":
    main()
