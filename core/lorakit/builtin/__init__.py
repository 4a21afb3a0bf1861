"""What every run needs, as a plugin like any other: found through lorakit's own entry point."""

from __future__ import annotations

from lorakit.builtin import (
    datasets,
    hf_directory,
    hub,
    loggers,
    lora,
    lora_serving,
    meta_directory,
    optimizers,
    precisions,
    snapshots,
)
from lorakit.hookspecs import hookimpl
from lorakit.options import CheckpointerOptions
from lorakit.recipes import Recipe
from lorakit.records import (
    AdapterMethod,
    CheckpointerType,
    DatasetFormat,
    LoggerType,
    ModelSource,
    OptimizerType,
    PrecisionPolicy,
    WeightFormat,
)


@hookimpl
def lorakit_adapters() -> list[AdapterMethod]:
    return [
        AdapterMethod(
            name="lora",
            summary="LoRA, rsLoRA and DoRA",
            options=lora.LoRAOptions,
            default=True,
            peft_type="LORA",
            parameter_prefix="lora_",
            targets=lora.targets,
            wrap=lora.wrap,
            to_config=lora.to_config,
            from_config=lora.from_config,
            merge=lora.merge,
            serving=lora_serving.serving,
        )
    ]


@hookimpl
def lorakit_optimizers() -> list[OptimizerType]:
    return [
        OptimizerType(
            name="adamw",
            summary="Adam with decoupled weight decay",
            options=optimizers.AdamWOptions,
            default=True,
            build=optimizers.build_adamw,
            state_bytes=optimizers.adamw_state_bytes,
        ),
        OptimizerType(
            name="sgd",
            summary="stochastic gradient descent",
            options=optimizers.SGDOptions,
            build=optimizers.build_sgd,
            state_bytes=optimizers.sgd_state_bytes,
        ),
    ]


@hookimpl
def lorakit_precisions() -> list[PrecisionPolicy]:
    return [
        PrecisionPolicy(
            name="fp32",
            summary="everything in fp32",
            default=True,
            options=precisions.FP32Options,
            resolve=precisions.resolve_fp32,
        ),
        PrecisionPolicy(
            name="bf16",
            summary="weights and activations in bf16, the adapter in fp32",
            resolve=precisions.resolve_bf16,
        ),
        PrecisionPolicy(
            name="bf16_pure",
            summary="everything in bf16, adapter and optimizer state included",
            resolve=precisions.resolve_bf16_pure,
        ),
        PrecisionPolicy(
            name="fp16",
            summary="weights and activations in fp16, gradients scaled; CUDA only",
            resolve=precisions.resolve_fp16,
        ),
    ]


@hookimpl
def lorakit_checkpointers() -> list[CheckpointerType]:
    return [
        CheckpointerType(
            name="safetensors",
            summary="checkpoints/step-N/ in safetensors and JSON",
            options=CheckpointerOptions,
            default=True,
            open=snapshots.open_store,
        )
    ]


@hookimpl
def lorakit_loggers() -> list[LoggerType]:
    return [
        LoggerType(
            name="terminal",
            summary="a live progress bar, or plain lines",
            options=loggers.TerminalOptions,
            default=True,
            open=loggers.open_terminal,
        ),
        LoggerType(
            name="disk",
            summary="metrics.jsonl, a line a step",
            default=True,
            open=loggers.open_disk,
        ),
    ]


@hookimpl
def lorakit_datasets() -> list[DatasetFormat]:
    return [
        DatasetFormat(
            name="messages",
            summary="chats: messages of role and content",
            options=datasets.MessagesOptions,
            example=datasets.messages_example,
        ),
        DatasetFormat(
            name="sharegpt",
            summary="chats as ShareGPT has them: conversations of from and value",
            options=datasets.ShareGPTOptions,
            example=datasets.sharegpt_example,
        ),
        DatasetFormat(
            name="alpaca",
            summary="instructions: instruction, input, output",
            options=datasets.AlpacaOptions,
            example=datasets.alpaca_example,
        ),
        DatasetFormat(
            name="text",
            summary="plain text, all of it trained",
            options=datasets.TextOptions,
            example=datasets.text_example,
        ),
    ]


@hookimpl
def lorakit_weight_formats() -> list[WeightFormat]:
    return [
        WeightFormat(
            name="safetensors",
            summary="Hugging Face directories of safetensors",
            claims=hf_directory.claims,
            open=hf_directory.HuggingFaceDirectory,
        ),
        WeightFormat(
            name="torch",
            summary="Hugging Face directories of pytorch_model*.bin, without running pickled code",
            claims=hf_directory.claims_torch,
            open=hf_directory.TorchDirectory,
        ),
        WeightFormat(
            name="meta",
            summary="Meta's own Llama directories: params.json and consolidated.*.pth",
            claims=meta_directory.claims,
            open=meta_directory.MetaDirectory,
        ),
    ]


@hookimpl
def lorakit_model_sources() -> list[ModelSource]:
    return [
        ModelSource(
            name="local",
            summary="a directory or file on this machine",
            claims=hf_directory.claims_local,
            fetch=hf_directory.fetch_local,
            examples=("models/my-model",),
        ),
        ModelSource(
            name="hub",
            summary="a repository of the Hugging Face hub",
            claims=hub.claims,
            fetch=hub.fetch,
            fetch_configuration=hub.fetch_configuration,
            hub_name=hub.hub_name,
            examples=("owner/name", "owner/name@revision"),
        ),
    ]


@hookimpl
def lorakit_recipe_problems(recipe: Recipe) -> list[str]:
    return precisions.fp16_problems(recipe)
