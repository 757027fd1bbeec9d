"""Build ``docs/config.md`` from the schema: ``python -m trainer.config.reference > docs/config.md``"""

from __future__ import annotations

import dataclasses
import inspect
import typing

from trainer.config.messages import one_line
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import Key, groups, keys

HEAD = """# Every config key

Made from the schema by `python -m trainer.config.reference > docs/config.md`; `afina config --keys` prints the same,
`afina config` the values of a run and the file that each group came from.

A key is set as `KEY=VALUE` behind any verb. An option of a group, `GROUP=OPTION`, takes a file of `conf/`, which holds
what differs from the defaults below. The files that list every key of a group, with its cost, are `conf/train.yaml`,
`conf/method/lora.yaml` and `conf/data/alpaca.yaml`.

`--config FILE` takes keys and options from a YAML file. A run's `config.yaml` has all of them and repeats the run. One
with a few starts from `conf/`, and what is typed wins over it:

```yaml
method: qlora                   # an option of a group
optim: {learning_rate: 1e-4}    # keys, by section
```

**Changes the result**: "no" says where and how a run is carried out. Such a key may differ, and it is the same run: it
has the same default name, an unfinished one resumes, a finished one is not redone. With "yes" another value is another
run. "yes, fixed" binds checkpoints, too: a run is not resumed from one that was written with another value (of `data`:
that has other tokens).
"""
COLUMNS = ("key", "type", "default", "limits", "changes the result", "meaning")


def config_reference() -> str:
    """Return the page as Markdown: a table a section, below what the section is for."""
    sections = typing.get_type_hints(TrainConfig)
    page = [HEAD]
    for section in dataclasses.fields(TrainConfig):
        page += [f"## {section.name}", inspect.cleandoc(sections[section.name].__doc__ or "")]
        if section.name in groups():
            page.append(f"Options: {', '.join(f'`{section.name}={option}`' for option in groups()[section.name])}")
        rows = [_row(key) for key in keys() if key.name.startswith(f"{section.name}.")]
        page.append("\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *rows]) + "\n")
    return "\n\n".join(page).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _row(key: Key) -> str:
    default = "required" if key.default == "???" else f"`{one_line(key.default)}`"
    fixed = key.changes_result and not key.resume_may_change
    changes = "yes, fixed" if fixed else "yes" if key.changes_result else "no"
    return _line([f"`{key.name}`", key.type, default, key.limits, changes, key.help])


def _line(cells: typing.Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(config_reference(), end="")
