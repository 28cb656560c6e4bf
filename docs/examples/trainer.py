"""SEFT in transformers.Trainer: python docs/examples/trainer.py PRUNED_MODEL TEXT.jsonl OUTPUT."""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.integrations.transformers import SeftCallback

model_path, data_path, output = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")

texts = load_dataset("json", data_files=data_path, split="train")
tokens = texts.map(
    lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True, remove_columns=["text"]
)
parts = tokens.train_test_split(test_size=0.1, seed=0)

args = TrainingArguments(
    output,
    max_steps=20,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    warmup_steps=2,
    max_grad_norm=1.0,  # SeftCallback hands it to SEFT, which alone clips
    logging_steps=5,
    eval_strategy="steps",
    eval_steps=10,
    save_steps=10,
    load_best_model_at_end=True,
    report_to="none",
)
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    # steps is left out: SeftCallback takes it from Trainer
    optimizer_cls_and_kwargs=(
        SeftOptimizer,
        {"model": model, "config": SeftConfig(density=0.01, interval=5), "lr": args.learning_rate},
    ),
)
SeftCallback.add_to(trainer)
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on from the newest checkpoint
trainer.save_model(output)
