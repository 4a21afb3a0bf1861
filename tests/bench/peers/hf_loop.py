"""A plain loop over transformers and PEFT, without a trainer; runs in the peers' environment.

Prints one JSON object: seconds, tokens (padding not counted) and trained tokens of each step.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    given = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)

    lines = given.rows.read_text(encoding="utf-8").splitlines()
    examples = []
    for line in lines:
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"][: given.length]
        masked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        examples.append((ids, [-100] * min(masked, len(ids)) + ids[masked:]))

    steps = []
    losses = []
    model.train()
    for step in range(given.steps):
        started = time.perf_counter()
        batch = [examples[(step * given.batch + i) % len(examples)] for i in range(given.batch)]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [tokenizer.pad_token_id] * (longest - len(i)) for i, _ in batch])
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch])
        labels = torch.tensor([t + [-100] * (longest - len(t)) for _, t in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        steps.append(
            {
                "seconds": time.perf_counter() - started,
                "tokens": int(mask.sum()),
                "trained_tokens": int((labels != -100).sum()),
            }
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"steps": steps, "losses": losses, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
