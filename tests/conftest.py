"""Settings every test shares: one thread per process, no network, no accelerator probing, fork-safe."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="seft-datasets-"))

import torch

# Ranks are forked from this process: it must never have started a thread pool of its own.
torch.set_num_threads(1)
