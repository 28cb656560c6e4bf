"""Imports that a DeepSpeed engine or FSDP2 makes on first use: once here, instead of 4 seconds in every forked rank."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # pulls in torch's compiler
import torch._dynamo  # noqa: F401
