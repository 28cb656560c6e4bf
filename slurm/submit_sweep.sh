#!/bin/bash
# Submit a sweep: the array, and the table of its runs when the last one has ended, however it ended.
#
#   SEEDS="0 1 2" DENSITIES="0.01 0.05" LRS="1e-3 3e-3" SWEEP=runs/sweep1 slurm/submit_sweep.sh --config R.yaml
#
# Arguments are options of seft train. SWEEP: the sweep's folder, default runs/sweep-TIME; AT_ONCE: runs at a time
# (default 4); SBATCH_ARGS: more options of sbatch, e.g. "--gpus-per-node 1 --time 1:00:00"; EVAL, TASKS: see sweep.sbatch.
# The same SWEEP again finishes what is unfinished.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=slurm/env.sh
. "${SEFT_ENV:-$root/slurm/env.sh}"

export SWEEP=${SWEEP:-runs/sweep-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$SWEEP"
[ -e "$SWEEP/tasks.tsv" ] || bash "$root/slurm/tasks.sh" >"$SWEEP/tasks.tsv"
runs=$(wc -l <"$SWEEP/tasks.tsv")
[ "$runs" -gt 0 ] || { echo "the sweep has no runs" >&2 && exit 2; }

read -ra args <<<"${SBATCH_ARGS:-}"
array=$(sbatch --parsable --array="0-$((runs - 1))%${AT_ONCE:-4}" "${args[@]}" "$root/slurm/sweep.sbatch" "$@")
table=$(sbatch --parsable --dependency="afterany:$array" "$root/slurm/collect.sbatch" --folder "$SWEEP")
echo "job $array: $runs runs in $SWEEP; job $table: the table of them, $SWEEP/sweep.md"
echo "to see how far it is: seft sweep --folder $SWEEP"
