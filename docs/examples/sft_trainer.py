"""SEFT in TRL's SFTTrainer: python docs/examples/sft_trainer.py PRUNED_MODEL CHATS.jsonl OUTPUT."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.integrations.transformers import SeftCallback

model_path, data_path, output = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")

args = SFTConfig(
    output,
    max_steps=20,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    max_length=64,
    max_grad_norm=1.0,  # SeftCallback hands it to SEFT, which alone clips
    logging_steps=5,
    save_steps=10,
    report_to="none",
    bf16=False,  # TRL's default is True; with bf16 weights leave it out
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset("json", data_files=data_path, split="train"),
    processing_class=tokenizer,
    optimizer_cls_and_kwargs=(
        SeftOptimizer,
        {"model": model, "config": SeftConfig(density=0.01, interval=5), "lr": args.learning_rate},
    ),
)
SeftCallback.add_to(trainer)
trainer.train()
trainer.save_model(output)
