"""SEFT in your own loop with torch.compile: python docs/examples/compiled_loop.py PRUNED_MODEL TEXT.jsonl OUTPUT.

A fourth argument names another backend of torch.compile than inductor, e.g. aot_eager, which needs no compiler.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seft_dist import SeftConfig, SeftOptimizer

model_path, data_path, output = sys.argv[1:4]
backend = (*sys.argv[4:], "inductor")[0]
steps, length = 20, 32
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
lines = Path(data_path).read_text(encoding="utf-8").splitlines()
ids = torch.tensor(tokenizer("\n".join(json.loads(line)["text"] for line in lines))["input_ids"])

seft = SeftOptimizer(model, SeftConfig(density=0.01, interval=5, steps=steps), lr=1e-3, max_grad_norm=1.0)
# Layer by layer: all layers share one graph. torch.compile(model) or model.compile() work as well.
for layer in model.model.layers:
    layer.compile(backend=backend)

for step in range(steps):
    starts = torch.randint(0, len(ids) - length, (4,))
    batch = torch.stack([ids[start : start + length] for start in starts])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    seft.step()
    seft.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}, gradient norm {seft.grad_norm:.3f}")

seft.detach()
model.save_pretrained(output)
tokenizer.save_pretrained(output)
