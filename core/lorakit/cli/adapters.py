"""`lorakit merge`, `lorakit generate` and `lorakit eval`."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import click

from lorakit.cli.chat import at_terminal, converse, show_piece, tell_if_cut, warn
from lorakit.errors import UserError


def _checked_device(_: click.Context, __: click.Parameter, name: str) -> str:
    # Only now, and before torch has loaded: options come with attrs.
    from lorakit.options import check_device

    try:
        check_device(None, None, name)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    return name


def _checked_number(
    _: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    # nan is in every range, for it is neither below nor above.
    if value is not None and math.isnan(value):
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


def _checked_text(_: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """The text; what stdin holds for `-`, where that is the prompt."""
    try:
        if parameter.name == "prompt" and text == "-":
            # The line's end, which echo writes, is not part of the prompt.
            text = sys.stdin.read().removesuffix("\n")
        if text is not None:
            # Bytes that the locale cannot read are in an argument as lone surrogates.
            text.encode()
    except UnicodeError:
        raise UserError(f"{parameter.opts[0]}: the text is not UTF-8") from None
    return text


@click.command()
@click.argument("run_or_adapter_or_model")
@click.option(
    "--prompt",
    metavar="TEXT",
    callback=_checked_text,
    help="What to ask; - reads stdin. Without it: a chat in the terminal.",
)
@click.option(
    "--system",
    metavar="TEXT",
    callback=_checked_text,
    help="A system message to put before the prompt or the chat.",
)
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
    "--top-p",
    metavar="P",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    callback=_checked_number,
    help="Draw among the likeliest tokens that together have probability P.",
)
@click.option(
    "--top-k", metavar="K", type=click.IntRange(1), help="Draw among the K likeliest tokens."
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of the draws."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object.")
@_device_option("auto, cpu, mps, cuda or cuda:N.")
@click.option("--full-precision", is_flag=True, help=FULL_PRECISION)
def generate(
    run_or_adapter_or_model: str,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    as_json: bool,
    device: str,
    full_precision: bool,
) -> None:
    """Answer TEXT with a trained run, an adapter or a model, through the chat template used in
    training; without TEXT, chat."""
    if prompt is None and (as_json or not at_terminal()):
        why = "--json is of one answer" if as_json else "a chat needs a terminal"
        raise click.UsageError(f"Missing option '--prompt': {why}.")
    for option, value in (("--top-p", top_p), ("--top-k", top_k)):
        if value is not None and temperature == 0.0:
            raise UserError(
                f"{option}: nothing is drawn at temperature 0, which takes the likeliest token",
                f"Leave {option} out, or set --temperature above 0.",
            )
    from lorakit.chat import Chat
    from lorakit.generation import Sampling
    from lorakit.trained import load_trained

    trained = load_trained(run_or_adapter_or_model, device, full_precision=full_precision)
    chat = Chat(
        trained.model,
        trained.tokenizer,
        Sampling(temperature, top_k or 0, 1.0 if top_p is None else top_p),
        seed=seed,
        max_new_tokens=max_new_tokens,
        context=trained.context,
        system=system,
    )
    if prompt is None:
        converse(chat)
        return
    answer = chat.ask(prompt, (lambda _: None) if as_json else show_piece, warn)
    if as_json:
        _print_json(
            prompt=prompt,
            answer=answer.text,
            tokens=answer.tokens,
            stopped=answer.stopped,
            seconds=round(answer.seconds, 3),
        )
        return
    click.echo()
    tell_if_cut(answer)


def _print_json(**values: Any) -> None:
    click.echo(json.dumps(values, ensure_ascii=False))


@click.command("eval")
@click.argument("run_or_adapter_or_model")
@click.option("--data", required=True, metavar="FILE", help="As data.path in a recipe.")
@click.option(
    "--format",
    "form",
    metavar="NAME",
    help="The data set format; by default the run's, with its options, or messages without a run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as one JSON object.")
@_device_option("auto, cpu, mps, cuda or cuda:N.")
@click.option("--full-precision", is_flag=True, help=FULL_PRECISION)
def eval_command(
    run_or_adapter_or_model: str,
    data: str,
    form: str | None,
    as_json: bool,
    device: str,
    full_precision: bool,
) -> None:
    """Loss and perplexity over the trained tokens of a data file."""
    from lorakit.trained import evaluate, load_trained

    trained = load_trained(run_or_adapter_or_model, device, full_precision=full_precision)
    scores = evaluate(trained, data, form)
    for loss in scores.losses:
        click.echo(f"data: {loss}", err=True)
    if as_json:
        # JSON has no number for what a broken model scores.
        finite = math.isfinite(scores.loss)
        _print_json(
            loss=scores.loss if finite else None,
            perplexity=scores.perplexity if finite else None,
            trained_tokens=scores.trained_tokens,
            rows=scores.rows,
            rows_cut=scores.rows_cut,
            rows_left_out=scores.rows_left_out,
        )
        return
    click.echo(
        f"loss {scores.loss:.4f}  perplexity {scores.perplexity:.2f}  "
        f"over {scores.trained_tokens:,} tokens of {scores.rows:,} rows"
    )
