"""What other trainers call the keys of a recipe: PEFT's LoraConfig, Hugging Face's Trainer and
SFTConfig, Axolotl's and torchtune's configurations."""

from __future__ import annotations

from collections.abc import Iterable

OURS = {
    # PEFT.
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "base_model_name_or_path": "model.path",
    "load_in_4bit": "quantization.name",
    "load_in_8bit": "quantization.name",
    "bnb_4bit_quant_type": "quantization.name",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    # Trainer and SFTConfig.
    "learning_rate": "optimizer.lr",
    "optim": "optimizer.name",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "lr_scheduler_type": "schedule.name",
    "warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_ratio",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "gradient_checkpointing": "training.activation_checkpointing",
    "torch_compile": "training.compile",
    "max_seq_length": "data.max_seq_len",
    "max_length": "data.max_seq_len",
    "packing": "data.packed",
    "train_on_inputs": "data.train_on_prompt",
    "dataset": "data.path",
    "bf16": "precision.name",
    "fp16": "precision.name",
    "torch_dtype": "precision.name",
    "output_dir": "output",
    "save_steps": "checkpointer.every_steps",
    "save_total_limit": "checkpointer.keep_last",
    "report_to": "loggers",
    "eval_dataset": "evaluation.path",
    "eval_steps": "evaluation.every_steps",
    "eval_strategy": "evaluation.every_steps",
    "evaluation_strategy": "evaluation.every_steps",
    "eval_on_start": "evaluation.at_start",
    "load_best_model_at_end": "evaluation.keep_best",
    "validation_file": "evaluation.path",
    "max_eval_samples": "evaluation.max_rows",
    "eval": "evaluation",
    "validation": "evaluation",
    # Axolotl and LLaMA-Factory.
    "val_set_size": "evaluation.fraction",
    "val_size": "evaluation.fraction",
    "test_datasets": "evaluation.path",
    # torchtune, which has most keys outside of any section.
    "lora_rank": "adapter.rank",
    "lora_attn_modules": "adapter.targets",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "max_steps": "training.max_steps",
    "max_grad_norm": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "enable_activation_checkpointing": "training.activation_checkpointing",
    "enable_activation_offloading": "training.activation_offloading",
    "max_seq_len": "data.max_seq_len",
    "train_on_input": "data.train_on_prompt",
    "lr": "optimizer.lr",
    "lr_scheduler": "schedule.name",
    "num_warmup_steps": "schedule.warmup_steps",
    "dtype": "precision.name",
    "metric_logger": "loggers",
    "dataset_val": "evaluation.path",
    "run_val_every_n_steps": "evaluation.every_steps",
}


def ours(key: str, section: str, there: Iterable[str]) -> str:
    """` (did you mean 'rank'?)` for another trainer's name of a key, else an empty string.

    Args:
        key: As the recipe has it.
        section: Where it has it; empty for the top.
        there: The keys that this section has.
    """
    full = OURS.get(key, "")
    if not full:
        return ""
    owner, _, name = full.rpartition(".")
    if owner != section:
        return f" (did you mean {full!r}?)"
    return f" (did you mean {name!r}?)" if name in there else ""
