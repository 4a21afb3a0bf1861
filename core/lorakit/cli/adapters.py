"""`lorakit merge`, `lorakit generate` and `lorakit eval`."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from lorakit.errors import UserError


def _checked_device(_: click.Context, __: click.Parameter, name: str) -> str:
    # Only now, and before torch has loaded: options come with attrs.
    from lorakit.options import check_device

    try:
        check_device(None, None, name)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    return name


def _checked_number(_: click.Context, parameter: click.Parameter, value: float) -> float:
    # nan is in every range, for it is neither below nor above.
    if math.isnan(value):
        raise UserError(f"{parameter.opts[0]}: expected a finite number, got nan")
    return value


def _device_option(help_text: str) -> Any:
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="NAME",
        callback=_checked_device,
        help=help_text,
    )


FULL_PRECISION = "Do not quantize a base that the adapter was trained over quantized."


@click.command()
@click.argument("run_or_adapter")
@click.option("--output", metavar="DIR", help="Where the model directory goes.")
@click.option("--check", is_flag=True, help="Only say whether vLLM serves the adapter unmerged.")
@click.option(
    "--base",
    default="original",
    show_default=True,
    type=click.Choice(["original", "dequantized"]),
    help="Merge into the weights as they were before quantization, or after it.",
)
@click.option(
    "--no-divergence", is_flag=True, help="Do not compare the two with the trained model."
)
@_device_option("Where they are compared.")
def merge(
    run_or_adapter: str,
    output: str | None,
    check: bool,
    base: str,
    no_divergence: bool,
    device: str,
) -> None:
    """Fold an adapter into its base weights, as a Hugging Face model directory."""
    if output is None and not check:
        raise click.UsageError("Missing option '--output'.")
    from pathlib import Path

    import torch

    from lorakit.base_model import resolve_device
    from lorakit.merge_divergence import divergence_sentence
    from lorakit.mergeable import open_mergeable
    from lorakit.progress import TerminalProgress
    from lorakit.runtime import tune_process

    progress = TerminalProgress()
    place = resolve_device(device)
    tune_process(torch.device("cpu"))
    opened = open_mergeable(run_or_adapter, progress)
    base_weight = opened.dequantized_base(place) if base == "dequantized" else None
    click.echo(f"serve with vLLM: {opened.serving_advice()}")
    if output is not None and not check:
        opened.merge(Path(output), progress, base_weight)
        click.echo(f"wrote {output}")
        said = None if no_divergence else divergence_sentence(opened, place, progress)
        if said:
            click.echo(said)


@click.command()
@click.argument("run_or_adapter_or_model")
@click.option("--prompt", required=True, metavar="TEXT", help="What to ask; - reads stdin.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0.0, 5.0),
    callback=_checked_number,
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of the draws."
)
@_device_option("auto, cpu, mps, cuda or cuda:N.")
@click.option("--full-precision", is_flag=True, help=FULL_PRECISION)
def generate(
    run_or_adapter_or_model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    full_precision: bool,
) -> None:
    """Answer TEXT with a trained run, an adapter or a model, through the chat template used in
    training."""
    from lorakit.context import prompt_notice
    from lorakit.generation import prompt_ids, stream_answer
    from lorakit.trained import load_trained

    text = sys.stdin.read() if prompt == "-" else prompt
    trained = load_trained(run_or_adapter_or_model, device, full_precision=full_precision)
    notice = prompt_notice(len(prompt_ids(trained.tokenizer, text)), trained.context)
    if notice:
        click.echo(f"warning: {notice}", err=True)
    pieces = stream_answer(
        trained.model,
        trained.tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@click.command("eval")
@click.argument("run_or_adapter_or_model")
@click.option("--data", required=True, metavar="FILE", help="As data.path in a recipe.")
@click.option(
    "--format",
    "form",
    metavar="NAME",
    help="The data set format; by default the run's, with its options, or messages without a run.",
)
@_device_option("auto, cpu, mps, cuda or cuda:N.")
@click.option("--full-precision", is_flag=True, help=FULL_PRECISION)
def eval_command(
    run_or_adapter_or_model: str, data: str, form: str | None, device: str, full_precision: bool
) -> None:
    """Loss and perplexity over the trained tokens of a data file."""
    from lorakit.trained import evaluate, load_trained

    trained = load_trained(run_or_adapter_or_model, device, full_precision=full_precision)
    scores = evaluate(trained, data, form)
    for loss in scores.losses:
        click.echo(f"data: {loss}", err=True)
    click.echo(
        f"loss {scores.loss:.4f}  perplexity {scores.perplexity:.2f}  "
        f"over {scores.trained_tokens:,} tokens of {scores.rows:,} rows"
    )
