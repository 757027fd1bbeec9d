"""Make rows out of the project's headlines, in three kinds, as prompt and completion.

python -m benchmarks.gpu.make_data TOKENIZER FOLDER [--scale 1]

unshared.jsonl  480 rows of 256 to 768 tokens that start differently; the second half is in the loss
shared.jsonl    1600 rows: the same 1024 tokens, then 64 to 192 of their own, the last half of these in the loss
short.jsonl     800 rows of about 60 to 145 tokens that start differently; the second half is in the loss
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

HEADLINES = Path(__file__).resolve().parents[2] / "examples" / "headlines" / "headlines.jsonl"
UNSHARED_ROWS, SHARED_ROWS, SHORT_ROWS = 480, 1600, 800


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="a folder with tokenizer.json")
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--scale", type=int, default=1, help="divides all lengths, to try the plumbing")
    asked = parser.parse_args(arguments)
    text = text_source(asked.tokenizer)
    asked.folder.mkdir(parents=True, exist_ok=True)
    unshared = [row("", random.randint(256, 768) // asked.scale, text) for _ in range(UNSHARED_ROWS)]
    prefix = text(1024 // asked.scale) + "\n"
    shared = [row(prefix, random.randint(64, 192) // asked.scale, text) for _ in range(SHARED_ROWS)]
    short = [row("", random.randint(48, 96) // asked.scale, text) for _ in range(SHORT_ROWS)]  # last: the others stay
    for name, rows in (("unshared", unshared), ("shared", shared), ("short", short)):
        (asked.folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def text_source(tokenizer_folder: Path) -> Callable[[int], str]:
    """Return a function that strings random headlines together until they are so many tokens; always the same ones."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    lines = [json.loads(line)["input"] for line in HEADLINES.read_text().splitlines()]
    tokens = {line: len(tokenizer.encode(f" {line}.").ids) for line in lines}
    random.seed(0)

    def text(min_tokens: int) -> str:
        chosen: list[str] = []
        count = 0
        while count < min_tokens:
            chosen.append(random.choice(lines))
            count += tokens[chosen[-1]]
        return ". ".join(chosen) + "."

    return text


def row(prefix: str, tokens: int, text: Callable[[int], str]) -> dict[str, str]:
    """Return a row of about so many tokens behind the prefix, half of them prompt; a number makes it its own."""
    prompt = f"{prefix}{random.randrange(10**9)} {text(tokens // 2)}\n"
    return {"prompt": prompt, "completion": text(tokens // 2)}


if __name__ == "__main__":
    main()
