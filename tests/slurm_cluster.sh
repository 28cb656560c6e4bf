#!/usr/bin/env bash
# A real Slurm cluster on this machine, for tests: munged, slurmctld and a slurmd for each node, nothing outside one folder.
#
#   slurm_cluster.sh up DIR [NODES]   start it in a new folder DIR (a short path: it holds a socket); default 2 nodes
#   slurm_cluster.sh crash DIR NODE   end a node as a power cut does: slurmd and everything it runs, at once
#   slurm_cluster.sh boot DIR NODE    start that node again
#   slurm_cluster.sh down DIR         end everything and remove DIR
#   slurm_cluster.sh run DIR [NODES]  up, say "ready", down as soon as stdin is closed (also when its owner was killed)
#
# Then, with SLURM_CONF=DIR/slurm.conf in the environment, sbatch, squeue, scancel ... talk to it.
#
# Needs root (namespaces) and Debian's packages slurm-wlm and munge. Each node lives in namespaces of its own:
# a hostname, an /etc/hosts that knows the other nodes, a 127.x.y.z address, and a pid namespace, so that ending its first
# process ends all of it and nothing else. Network ports are the machine's.
# CPUS, GPUS (each node's; the GPUs are copies of /dev/null) and PORT (first of NODES + 1 ports) may be set.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
DIR=$(realpath -m "${2:?"usage: $0 up|crash|boot|down|run DIR ..."}")
export SLURM_CONF=$DIR/slurm.conf
CPUS=${CPUS:-4} GPUS=${GPUS:-2}

address() { # address NUMBER: of a node, 0 is the login node; clusters of other ports have other addresses
    echo "127.$((PORT / 256)).$((PORT % 256)).$((10 + $1))"
}

write_conf() { # write_conf NODES
    # Waiting times are those of a test: nobody wants to sit through the 5 minutes after which a silent node counts as down.
    # Job numbers start far apart, since ports of jobs are made from them and clusters on this machine share its ports.
    cat <<END
ClusterName=test
SlurmctldHost=login($(address 0))
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge.socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
TmpFS=$DIR/tmp/%n
SlurmctldPidFile=$DIR/log/slurmctld.pid
SlurmdPidFile=$DIR/log/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log
FirstJobId=$((1000 + (PORT * 37) % 50000))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SlurmdTimeout=6
KillWait=20
MinJobAge=86400
END
    local i
    for i in $(seq "$1"); do
        echo "NodeName=node$i NodeHostname=node$i NodeAddr=$(address "$i") Port=$((PORT + i)) CPUs=$CPUS RealMemory=4000 Gres=gpu:$GPUS"
    done
    # "urgent" takes the nodes of running "main" jobs, after these had 30 s to stop; "scavenge" is stopped without a grace
    echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=10 GraceTime=30 State=UP"
    echo "PartitionName=scavenge Nodes=ALL PriorityTier=1 State=UP"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=20 State=UP"
}

start() { # start NAME COMMAND...: in the background, in namespaces of its own whose pid 1 is a shell that waits
    local name=$1
    shift
    # shellcheck disable=SC2016  # the variables are the inner shell's
    unshare --mount --uts --pid --fork --kill-child --mount-proc bash -c '
        mount --bind "$0/hosts" /etc/hosts && hostname "$1" && shift && eval "$*" && wait -n' \
        "$DIR" "$name" "$@" </dev/null >"$DIR/log/$name.out" 2>&1 &
    echo $! >"$DIR/pid/$name"
}

boot() { # boot NODE
    mkdir -p "$DIR/spool/$1" "$DIR/tmp/$1"
    start "$1" slurmd -D -N "$1" '&'
}

crash() { # crash NAME: kill pid 1 of the namespace (the only child of unshare); the kernel kills the rest
    local pid
    pid=$(cat "$DIR/pid/$1")
    rm "$DIR/pid/$1"
    pkill -KILL -P "$pid" || true
    while [ -e "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null; do sleep 0.05; done
}

up() { # up NODES
    mkdir -p "$DIR"/{state,spool,tmp,log,pid,dev}
    local i
    { cat /etc/hosts && for i in $(seq 0 "$1"); do echo "$(address "$i") $([ "$i" = 0 ] && echo login || echo "node$i")"; done; } \
        >"$DIR/hosts"
    write_conf "$1" >"$SLURM_CONF"
    for i in $(seq 0 $((GPUS - 1))); do mknod "$DIR/dev/nvidia$i" c 1 3; done
    [ "$GPUS" = 0 ] || echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >"$DIR/gres.conf"
    (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
    start login munged -F --force --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/log/munged.pid" \
        --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge.seed" '& slurmctld -D &'
    for i in $(seq "$1"); do boot "node$i"; done
    for _ in $(seq 600); do
        [ "$(sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null)" = "$1" ] && return
        sleep 0.1
    done
    echo "The cluster did not come up in 60 s:" >&2
    tail -n 5 "$DIR"/log/* >&2
    return 1
}

down() {
    local file
    for file in "$DIR"/pid/*; do
        [ ! -e "$file" ] || crash "$(basename "$file")"
    done
    rm -rf "$DIR"
}

case $1 in
    up) PORT=${PORT:-16817} && up "${3:-2}" ;;
    crash) crash "$3" ;;
    boot) boot "$3" ;;
    down) [ ! -e "$SLURM_CONF" ] || down ;;
    run)
        trap down EXIT
        PORT=${PORT:-16817} && up "${3:-2}" && echo ready && cat >/dev/null
        ;;
    *) sed -n '2,16p' "$0" >&2 && exit 2 ;;
esac
