#!/bin/bash
# One rank, as srun starts it: task.sh COMMAND...
#
# Signals to a step reach all of its processes. USR1 is ignored until the rank sets its own handler, for it must not end a
# rank that is still loading its libraries. TERM ends the rank, not this shell, which waits for it. The code 2 of a rank
# ("the same command would fail again") is kept, since srun reports only the largest code, and Slurm ends the other ranks.
trap '' USR1
trap : TERM
"$@"
code=$?
[ "$code" != 2 ] || touch "$ATTEMPT/refused"
exit "$code"
