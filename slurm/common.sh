# shellcheck shell=bash
#
# What the batch scripts share: who this job is, a check of its nodes, a record of every attempt, and what happens when
# an attempt ends. A script reads this file, then calls
#
#   take_output "$@"           RUN, the run's folder, is --output of the arguments, else the variable RUN, else runs/NAME-JOB
#   open_run "$@"              ends the job if the run is finished, records the attempt in RUN/slurm
#   check_config SCRIPT "$@"   a configuration that cannot work ends the job now, and for good
#   check_nodes                every node sees the run's folder, the first node and its GPUs; else: another try without it
#   step SRUN...               runs this srun command; USR1 reaches its ranks, until they have saved and ended
#   close_run CODE             done, requeue or fail
#
# There is no "set -e": exit codes decide what happens next.
set -uo pipefail

log() { echo "$(date +%FT%T) [$JOB.$RESTARTS] $*"; }

die() { # die CODE MESSAGE: end the job for good
    log "$2" >&2
    exit "$1"
}

# ---------------------------------------------------------------- this job

# A task of an array has a job number of its own, except one, whose number is also that of the whole array: requeueing that
# number would requeue every task. ARRAY_TASK always means the one task.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
RESTARTS=${SLURM_RESTART_COUNT:-0} # how often Slurm has started this job again

SEFT_ENV=${SEFT_ENV:-$root/slurm/env.sh}
set +u # modules, conda and /etc/profile use unset variables
# shellcheck source=slurm/env.sh
. "$SEFT_ENV" || die 1 "cannot read $SEFT_ENV"
if [ -n "$MODULES" ]; then
    command -v module >/dev/null || . /etc/profile
    # shellcheck disable=SC2086  # several words
    module load $MODULES || die 1 "cannot load the modules $MODULES"
fi
set -u
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -n "$LAUNCH_PREFIX" ] || [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
read -ra srun_args <<<"$SRUN_ARGS"
read -ra python <<<"$LAUNCH_PREFIX $PYTHON"

# The first node is where ranks meet. The port lies below the range of outgoing connections, differs between jobs that
# share a node, and changes when a job starts again, since a dead attempt may still hold the old one.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (7 * SLURM_JOB_ID + RESTARTS) % 12000))

NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
[ "$NPROC" -ge 1 ] || NPROC=1
cpus_per_rank=$((SLURM_CPUS_ON_NODE / NPROC))
[ "$cpus_per_rank" -ge 1 ] || cpus_per_rank=1
# srun does not take the job's --cpus-per-task over (since Slurm 22.05): each step says what it needs

export root PYTHON LAUNCH_PREFIX NODE_CHECK MASTER_ADDR MASTER_PORT NPROC NCCL_DEBUG
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_rank}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export SLURM_EXPORT_ENV=ALL # with sbatch --export=NONE, srun would start its tasks without all of this
[ -z "$IFNAME" ] || export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
command -v nvidia-smi >/dev/null || command -v rocm-smi >/dev/null || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

unset RANK LOCAL_RANK WORLD_SIZE # of a job from which this one was submitted

# ---------------------------------------------------------------- signals

FORWARD=USR1 # the signal by which this shell tells the ranks
stopped= # USR1: time limit or preemption is near.  TERM: Slurm ends this attempt (scancel, preemption, a lost node)
ranks=   # the srun that passes it on

# Slurm sends USR1 to this shell only (--signal=B:), and srun passes on what it gets. It is sent again and again until the
# ranks have ended: one that is just being started has no handler yet, and a second signal does no harm. (scancel
# could send it too, but where Slurm is busy it tries again later, and may then hit the next attempt.)
on_usr1() {
    [ -z "$stopped" ] || return
    stopped=USR1
    log "USR1, $(squeue --noheader --jobs "$JOB" --format %L) left: the ranks save and stop"
    [ -z "$ranks" ] || tell_ranks
}

tell_ranks() {
    while [ "$stopped" = USR1 ] && kill -s "$FORWARD" "$ranks" 2>/dev/null; do sleep 20; done &
}

# TERM has reached the ranks too. Whether the job comes back is Slurm's decision, which is already made.
on_term() {
    stopped=TERM
    log "TERM: Slurm ends this attempt"
}

trap on_usr1 USR1
trap on_term TERM

await() { # await PID: wait for a child's end, whatever signals arrive here; returns its exit code
    local code
    while :; do
        wait "$1" # also returns when a signal was handled
        code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

step() { # step SRUN...: start ranks and wait for their end; returns srun's exit code
    [ -z "$stopped" ] || return 1
    "$@" &
    ranks=$!
    [ "$stopped" != USR1 ] || tell_ranks # it came in this very moment
    await "$ranks"
}

# ---------------------------------------------------------------- the run's folder

# RUN/slurm/attempts.tsv   a line for each attempt that ended: job, restarts, how, exit code, newest checkpoint, nodes, times
# RUN/slurm/JOB-RESTARTS/  what an attempt ran: script.sbatch, env.sh, common.sh, arguments.txt, environment.txt, job.txt,
#                          code.txt, config.yaml, nodes.txt

newest() { # newest checkpoint of the run, "none" if there is none
    local found=none file
    for file in "$RUN"/checkpoints/step-*/checkpoint.json; do
        [ ! -e "$file" ] || found=$(basename "$(dirname "$file")")
    done
    echo "$found"
}

record() { # record HOW CODE: write down how this attempt ended
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' \
        "$JOB" "$RESTARTS" "$1" "$2" "$(newest)" "$SLURM_JOB_NODELIST" "$begin" "$(date +%FT%T)" >>"$RUN/slurm/attempts.tsv"
}

ended() { # ended HOW [CHECKPOINT]: how many attempts of this job ended so (there)
    awk -F '\t' -v job="$JOB" -v how="$1" -v at="${2:-}" '$1 == job && $3 == how && (at == "" || $5 == at)' \
        "$RUN/slurm/attempts.tsv" | wc -l
}

RUN=${RUN:-runs/$SLURM_JOB_NAME-$JOB}
RESULT=result.json # in RUN: whole once the run is finished

finished() { # finished FILE: it is there and whole. An empty or cut one, as a full disk leaves it, is no result
    [ -s "$1" ] && [ "$(head -c 1 "$1" | tr -d '\0')" = "{" ] && [ "$(tail -c 3 "$1" | tr -d '\0[:space:]' | tail -c 1)" = "}" ]
}

take_output() { # take_output ARGUMENTS...
    local argument previous=
    for argument; do
        [ "$previous" != --output ] || RUN=$argument
        [[ $argument != --output=* ]] || RUN=${argument#--output=}
        previous=$argument
    done
}

open_run() { # open_run ARGUMENTS...
    begin=$(date +%FT%T)
    RUN=$(realpath -m "$RUN")
    if finished "$RUN/$RESULT"; then
        log "$RUN is finished, it holds $RESULT: nothing to do"
        exit 0
    fi
    ATTEMPT=$RUN/slurm/$JOB-$RESTARTS
    mkdir -p "$ATTEMPT" || die 1 "cannot write $RUN: needs a folder that this job may write and that every node sees"
    local other
    other=$(cat "$RUN/slurm/job" 2>/dev/null)
    if [ -n "$other" ] && [ "$other" != "$JOB" ] && squeue --noheader --jobs "$other" --states R,CG 2>/dev/null | grep -q .; then
        die 1 "job $other is writing to $RUN: wait for it, cancel it, or choose another RUN"
    fi
    echo "$JOB" >"$RUN/slurm/job"
    export RUN ATTEMPT
    log "attempt $RESTARTS on $SLURM_JOB_NODELIST, $NPROC ranks a node, meeting at $MASTER_ADDR:$MASTER_PORT"
    log "run $RUN, newest checkpoint: $(newest)"

    scontrol write batch_script "$SLURM_JOB_ID" "$ATTEMPT/script.sbatch" >/dev/null || cp "$0" "$ATTEMPT/script.sbatch"
    scontrol show job "$SLURM_JOB_ID" >"$ATTEMPT/job.txt"
    cp "$SEFT_ENV" "$ATTEMPT/env.sh"
    cp "$root/slurm/common.sh" "$ATTEMPT/"
    printf '%q ' "$@" >"$ATTEMPT/arguments.txt"
    # by prefix, so that passwords and tokens of the user's shell stay out
    env -0 | grep -zE '^(SLURM|SRUN|SBATCH|SEFT|MASTER_|NPROC=|RUN=|OMP_|MKL_|CUDA|NVIDIA_|ROCR_|HIP_|NCCL_|RCCL_|GLOO_|UCX_|FI_|TORCH|PYTORCH|DS_|PYTHON|HF_H|LAUNCH_PREFIX=|MODULES=|LOADEDMODULES=|VIRTUAL_ENV=|CONDA_PREFIX=|LD_LIBRARY_PATH=|PATH=)' |
        grep -zvE '^[A-Za-z0-9_]*(JWT|TOKEN|KEY|SECRET|PASS)' | sort -z | tr '\0' '\n' >"$ATTEMPT/environment.txt"
    { git -C "$root" rev-parse HEAD && git -C "$root" status --short; } >"$ATTEMPT/code.txt" 2>&1
}

# ---------------------------------------------------------------- before the run

check_config() { # check_config SCRIPT ARGUMENTS...: an unknown option or a value that cannot work will not work later either
    local code
    "${python[@]}" "$@" --print_config >"$ATTEMPT/config.yaml"
    code=$?
    [ -z "$stopped" ] || return
    case $code in
        0) ;;
        1 | 2)
            record refused "$code"
            die "$code" "the configuration was refused: not starting, and not trying again"
            ;;
        *) close_run "$code" ;;
    esac
}

bad_nodes= # to be left out of the next attempt

check_nodes() {
    [ -z "$stopped" ] || return
    timeout 180 srun "${srun_args[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        bash "$root/slurm/check_node.sh" >"$ATTEMPT/nodes.txt" &
    await $!
    sort "$ATTEMPT/nodes.txt"
    [ -z "$stopped" ] || return
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        grep -qE "(^|: )$node: ok" "$ATTEMPT/nodes.txt" || bad_nodes=${bad_nodes:+$bad_nodes,}$node
    done
    [ -n "$bad_nodes" ] || return
    if [ "$(grep -c ': ok' "$ATTEMPT/nodes.txt")" = 0 ]; then
        bad_nodes= # not the nodes' fault: others would not do better
    fi
    log "the check of the nodes failed on ${bad_nodes:-all nodes}"
    close_run 1
}

# ---------------------------------------------------------------- after the run

requeue() { # requeue WHY: give the job back to the queue, where it waits about 2 minutes; it keeps its number
    log "requeue: $1"
    trap '' TERM # Slurm ends this script by it, at once; first the bad nodes must be known
    if scontrol requeue "$JOB"; then
        if [ -n "$bad_nodes" ]; then # beside those that were left out before
            local before
            before=$(sed -n 's/.* ExcNodeList=\([^( ]*\).*/\1/p' "$ATTEMPT/job.txt")
            scontrol update JobId="$JOB" ExcNodeList="$bad_nodes${before:+,$before}"
        fi
        trap - TERM
        sleep 600 & # ending before Slurm has taken the job back would count as its end
        wait $!
    fi
    die 1 "Slurm did not take the job back. Submit it again with RUN=$RUN: the run goes on from $(newest)"
}

close_run() { # close_run CODE: the step ended with it. Ends this script
    local code=$1 at
    at=$(newest)
    [ ! -e "$ATTEMPT/refused" ] || code=2
    if finished "$RUN/$RESULT"; then
        record finished "$code"
        log "finished: $RUN"
        exit 0
    elif [ "$stopped" = TERM ]; then
        record terminated "$code"
        exit 143
    elif [ "$code" = 2 ]; then
        record failed 2
        die 2 "failed with code 2: the same command would fail again, not trying"
    elif [ "$stopped" = USR1 ] || [ "$code" = 0 ]; then
        # Code 0 without a result: ranks that stopped by a signal this shell was not sent (--signal without B:)
        record stopped "$code"
        [ "$(ended stopped "$at")" -le $((MAX_RESTARTS + 1)) ] ||
            die 1 "stopped $((MAX_RESTARTS + 2)) times at checkpoint $at: the time limit leaves no time for a step and its checkpoint, raise --time"
        requeue "stopped at checkpoint $at"
    else
        record failed "$code"
        [ "$(ended failed)" -le "$MAX_RESTARTS" ] || die "$code" "failed with code $code: no restart is left (MAX_RESTARTS=$MAX_RESTARTS)"
        # The second time at the same place is the last: torchrun makes every code 1, so 2 is not known to all scripts
        [ "$(ended failed "$at")" = 1 ] || die "$code" "failed with code $code, twice at checkpoint $at: not trying again"
        requeue "failed with code $code at checkpoint $at"
    fi
}

close_once() { # close_once CODE: as close_run, for a program that has no checkpoints: Slurm alone may start it again
    local how=finished
    [ "$1" = 0 ] || how=failed
    [ "$stopped" != TERM ] || how=terminated
    record "$how" "$1"
    log "$how with code $1: $RUN"
    [ "$how" != terminated ] || exit 143
    exit "$1"
}
