# shellcheck shell=bash disable=SC2034  # the scripts beside this file read what is set here
#
# Facts about your cluster. This is the only file here that needs editing; nothing in the batch scripts is specific to a
# site. Source it before you submit (sbatch itself reads the SBATCH_ variables); the job reads it again on its first node:
#
#   . slurm/env.sh && sbatch --nodes 2 slurm/train.sbatch --config R.yaml
#
# Every value can be given for one job instead: options of sbatch win over SBATCH_ variables, and
# "NPROC=4 sbatch ..." wins over what is set below. Another file: SEFT_ENV=/path/to/my.sh sbatch ...

# --- where jobs go (defaults of sbatch's options; they take the place of the #SBATCH lines)
#export SBATCH_PARTITION=gpu
#export SBATCH_ACCOUNT=my_project
#export SBATCH_QOS=normal
#export SBATCH_CONSTRAINT=h100
#export SBATCH_TIMELIMIT=24:00:00
#export SBATCH_GPUS_PER_NODE=8        # or SBATCH_GRES=gpu:8; without it a job may well get no GPU

# --- software
: "${MODULES:=}"                      # modules to load, e.g. "cuda/13.0 openmpi"
#. /shared/venv/bin/activate          # this is an ordinary shell file
: "${PYTHON:=}"                       # interpreter; empty: .venv of the checkout if it has one, else (and in containers) python3
: "${LAUNCH_PREFIX:=}"                # put before every python, e.g. "apptainer exec --nv --bind /data /images/seft.sif"
: "${SRUN_ARGS:=}"                    # more options of srun, e.g. "--container-image=/images/seft.sqsh --container-mounts=/data:/data"
#export HF_HOME=/shared/huggingface   # a folder that every node sees
#export HF_HUB_OFFLINE=1              # compute nodes without internet

# --- network
: "${IFNAME:=}"                       # interface for the first contact of ranks (NCCL and gloo), e.g. ib0; empty: they choose
: "${NCCL_DEBUG:=WARN}"               # INFO: which network NCCL really uses
#export NCCL_IB_HCA=mlx5

# --- processes
: "${NPROC:=}"                        # ranks of a node; empty: its GPUs, or 1 if it has none
: "${NODE_CHECK:=}"                   # one more check of each node before the run, e.g. "dcgmi diag -r 1"; non-zero: bad node
: "${MAX_RESTARTS:=3}"                # restarts of one job after failures; time limits and preemptions are not counted
