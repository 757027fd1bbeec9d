"""Show what a run would train on, token by token, before a GPU is asked for: ``afina data``. No model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.config.schema import TrainConfig
from trainer.tracking.counter import ProgressCounter, loading_libraries


def view(config: TrainConfig, html: Path | None, examples: int) -> None:
    """Prepare and check the data of a run, and show it on stdout and on an HTML page.

    Args:
        config: the whole configuration.
        html: the page's file; ``None`` shows the data on stdout alone.
        examples: rows that are shown on stdout.

    Raises:
        DataError: training would refuse this data; raised after everything has been shown.
        ConfigError: there cannot be a page at ``html``; raised before anything is done.
    """
    from trainer.html import check_target
    from trainer.models.hub import check_hub

    if html is not None:
        check_target("--html", html)
    check_hub(config)  # before torch
    with loading_libraries():
        from trainer.models.embedded import resolve
        from trainer.models.loading import load_tokenizer
        from trainer.silence import silence_libraries
        from trainer.view import collect, page, terminal
        from trainer.view.pieces import TokenDecoder

    silence_libraries()
    tokenizer = load_tokenizer(resolve(config.model.name_or_path, config.model.revision), config.model)
    data, refusal = collect.load_or_inspect(config, tokenizer)
    with ProgressCounter("measuring lengths and shared prefixes"):
        overview, decoder = collect.collect_overview(data, config, tokenizer, refusal), TokenDecoder(tokenizer)
    terminal.show(replace(overview, examples=collect.few_examples(data, config, decoder, examples)))
    if html is not None:
        page.write(replace(overview, examples=collect.many_examples(data, config, decoder)), html)
        print(f"page: {html}", flush=True)
    if refusal is not None:
        raise refusal
