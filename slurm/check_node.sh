#!/bin/bash
# Run by srun once on every node before a run: a few seconds here are cheaper than hours that hang. Prints one line,
# "NODE: ok ..." or "NODE: what is wrong". Variables come from common.sh.
node=$SLURMD_NODENAME

bad() {
    echo "$node: $*"
    exit 1
}

# shellcheck disable=SC2154  # exported by common.sh
[ -f "$root/slurm/common.sh" ] || bad "does not see the code in $root: needs a shared folder"
[ -w "$ATTEMPT" ] || bad "cannot write to $RUN: needs a shared folder"
getent hosts "$MASTER_ADDR" >/dev/null || bad "does not know the address of $MASTER_ADDR"

gpus=
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && command -v nvidia-smi >/dev/null; then
    found=$(nvidia-smi --list-gpus) || bad "nvidia-smi failed: $found"
    count=$(grep -c '^GPU' <<<"$found")
    [ "$count" -ge "$SLURM_GPUS_ON_NODE" ] || bad "has $count working GPUs of $SLURM_GPUS_ON_NODE"
    gpus=", $count x $(head -n 1 <<<"$found" | sed 's/^GPU 0: \(.*\) (UUID.*/\1/')"
fi

# shellcheck disable=SC2086  # several words
version=$($LAUNCH_PREFIX "$PYTHON" --version 2>&1) || bad "cannot run $LAUNCH_PREFIX $PYTHON: $version"

if [ -n "$NODE_CHECK" ]; then
    said=$(bash -c "$NODE_CHECK" 2>&1) || bad "failed NODE_CHECK: $said"
fi

echo "$node: ok, $version$gpus, $(awk '/MemAvailable/ {printf "%d", $2 / 1048576}' /proc/meminfo) GiB of memory free"
