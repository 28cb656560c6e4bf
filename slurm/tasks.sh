#!/bin/bash
# The runs of a sweep, one line each: its name, a tab, its options of seft train. They are the lines of the file TASKS,
# or every combination of SEEDS, DENSITIES and LRS (lists in one word each: "1e-3 3e-3"). sweep.sbatch and
# submit_sweep.sh write them to SWEEP/tasks.tsv.
set -euo pipefail

if [ -n "${TASKS:-}" ]; then
    grep -vE '^[[:space:]]*(#|$)' "$TASKS" | while read -r options; do
        name=$(sed -E 's/^--//; s/ +--/-/g; s/[ =]+/_/g; s/[^A-Za-z0-9._-]/_/g' <<<"$options")
        printf '%s\t%s\n' "$name" "$options"
    done
else
    for density in ${DENSITIES:-0.01 0.05}; do
        for lr in ${LRS:-1e-3}; do
            for seed in ${SEEDS:-0 1 2}; do
                printf 'density%s-lr%s-seed%s\t' "$density" "$lr" "$seed"
                printf -- '--seft.density %s --optim.lr %s --seed %s --seft.seed %s\n' "$density" "$lr" "$seed" "$seed"
            done
        done
    done
fi
