"""PEFT + TRL's SFTTrainer on the benchmark's rows; runs in the peers' environment.

Prints one JSON object: seconds, tokens (padding not counted) and trained tokens of each step.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Times optimizer steps and counts what they saw."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.tokens = self.trained = 0
        self.losses: list[float] = []

    def count(self, batch: Any) -> None:
        mask = batch.get("attention_mask")
        self.tokens += int(batch["input_ids"].numel() if mask is None else mask.sum())
        self.trained += int((batch["labels"] != -100).sum())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.started
        self.steps.append(
            {"seconds": seconds, "tokens": self.tokens, "trained_tokens": self.trained}
        )
        self.tokens = self.trained = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class CountingTrainer(SFTTrainer):
    """Counts a batch when it is trained: batches are collated one step ahead."""

    clock: Clock

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, help="chats; the last answer is trained")
    parser.add_argument("--tokens", type=Path, help="rows of input_ids and completion_mask")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on")
    given = parser.parse_args()

    torch.manual_seed(0)
    quantization = None
    if given.nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    lines = (given.tokens or given.rows).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if given.rows:
        chats = [row["messages"] for row in rows]
        rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
    clock = Clock()
    output = tempfile.TemporaryDirectory()
    trainer = CountingTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(given.model),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        args=SFTConfig(
            output_dir=output.name,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            max_length=given.length,
            packing=given.packed,
            completion_only_loss=True,
            train_sampling_strategy="sequential",
            gradient_checkpointing=given.checkpointing == "on",
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        callbacks=[clock],
    )
    trainer.clock = clock
    trainer.train()
    print(
        json.dumps(
            {
                "steps": clock.steps,
                "losses": clock.losses,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
