"""Verbs for a finished run: score it, answer a prompt, chat, merge its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.folders import find_run
from trainer.cli.options import Adapters, Bits, NoAdapter, Overrides, Run
from trainer.errors import ConfigError
from trainer.tracking.counter import loading_libraries
from trainer.tracking.logs import print_line


def evaluate(run: Run, overrides: Overrides = None, adapters: Adapters = None) -> None:
    """Score a run on its held-out rows.

    With the run's config, and your overrides on top.
    """
    folder = find_run(run)
    from launch import table

    with loading_libraries():
        import trainer.inference.score

    scores = trainer.inference.score.score_run(folder, overrides or [], adapters or [])
    metrics = next(iter(scores.values()))
    rows = [[metric, *(f"{scored[metric]:.4f}" for scored in scores.values())] for metric in metrics]
    table.show(["metric", *(scores if adapters else ["value"])], rows)


def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="what the user says", show_default=False)],
    overrides: Overrides = None,
    input: Annotated[str, typer.Option(metavar="TEXT", help="what the prompt is about, as in an Alpaca row")] = "",
    adapters: Adapters = None,
    no_adapter: NoAdapter = False,
    bits: Bits = None,
    device_map: Annotated[str | None, typer.Option(metavar="MAP", help="auto spreads a big base over devices")] = None,
) -> None:
    """Answer a prompt with a run's model.

    Sampling is set by overrides of generate.
    """
    _check_bits(bits)
    folder = find_run(run)
    with loading_libraries():
        import trainer.inference.generate

    answers = trainer.inference.generate.generate_run(
        folder,
        prompt,
        input=input,
        adapter=not no_adapter,
        adapters=adapters or [],
        bits=bits,
        device_map=device_map,
        overrides=overrides or [],
    )
    for number, (name, answer) in enumerate(answers):
        if adapters:
            print(f"{chr(10) if number else ''}# {name}")
        print(answer, flush=True)


def chat(
    run: Run,
    overrides: Overrides = None,
    adapters: Adapters = None,
    no_adapter: NoAdapter = False,
    bits: Bits = None,
) -> None:
    """Talk with a run's model.

    Answers come as they are written; /adapter switches on the way, /help says what else there is.
    """
    _check_bits(bits)
    folder = find_run(run)
    with loading_libraries():
        import trainer.inference.chat

    trainer.inference.chat.chat_run(
        folder, adapter=not no_adapter, adapters=adapters or [], bits=bits, overrides=overrides or []
    )


def merge(
    run: Run,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="the folder that is made")],
    overrides: Overrides = None,
) -> None:
    """Merge a run's adapter into its base, proved.

    The merged model is read back from disk and compared with the live adapter, or deleted.
    """
    folder = find_run(run)
    with loading_libraries():
        import trainer.inference.merge

    result = trainer.inference.merge.merge_run(folder, to, overrides or [])
    print_line(f"folded: {result.layers} layers, each as with its adapter; {result.tensors} tensors to the bit on disk")
    allowed = f"{result.bound:.1e} is allowed, the base without it is {result.base_distance:.1e} away"
    print_line(f"logits of {result.prompts} prompts: {result.distance:.1e} from the live adapter's; {allowed}")
    print_line(f"likeliest token: the same at {100 * result.top_token_agreement:.1f} % of the positions")
    if result.training_distance is not None:
        print_line(f"trained on a quantised base: {result.training_distance:.1e} from the adapter there")
    print_line(f"merged: {to}")


def _check_bits(bits: int | None) -> None:
    if bits not in (None, 16, 8, 4):
        raise ConfigError("--bits", value=bits, reason="must be 16, 8 or 4", hint="leave it out for the run's own")
