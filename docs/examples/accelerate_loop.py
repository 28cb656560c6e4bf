"""SEFT in a loop of accelerate: accelerate launch docs/examples/accelerate_loop.py PRUNED_MODEL TEXT.jsonl OUTPUT."""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.io import checkpoint

model_path, data_path, output = sys.argv[1:4]
steps, accumulate = 20, 2
accelerator = Accelerator(gradient_accumulation_steps=accumulate)
tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")

texts = load_dataset("json", data_files=data_path, split="train")
tokens = texts.map(
    lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True, remove_columns=["text"]
)
loader = DataLoader(
    tokens, batch_size=2, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)
)

# SEFT clips by max_grad_norm: there is no accelerator.clip_grad_norm_ in the loop
seft = SeftOptimizer(model, SeftConfig(density=0.01, interval=5, steps=steps), lr=1e-3, max_grad_norm=1.0)
scheduler = torch.optim.lr_scheduler.LinearLR(seft, start_factor=1.0, end_factor=0.1, total_iters=steps)
model, optimizer, loader, scheduler = accelerator.prepare(model, seft, loader, scheduler)

while seft.num_steps < steps:
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            accelerator.print(f"step {seft.num_steps}: loss {loss.item():.3f}, gradient norm {seft.grad_norm:.3f}")
        if seft.num_steps == steps:
            break

checkpoint.save(seft, f"{output}/checkpoints", {})  # goes on with checkpoint.load(seft, path), on any number of ranks
state = accelerator.get_state_dict(model)
accelerator.unwrap_model(model).save_pretrained(output, state_dict=state, is_main_process=accelerator.is_main_process)
