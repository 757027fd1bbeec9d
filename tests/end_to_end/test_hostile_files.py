"""Whatever stands in a config, a chat template or a marker of somebody else's: nothing is started, connected to or
changed by it, and it is read or refused in one line. Adapters: ``tests/unit/methods/test_hostile_adapters.py``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.watched import harm, watched
from trainer.checkpoint.commit import find_corruption
from trainer.checkpoint.resume import find_resume_point
from trainer.config import load, read_values, to_yaml
from trainer.config.suggestions import config_fields
from trainer.data.sources.rows import RowError
from trainer.data.templates.chat_template import ChatTemplate
from trainer.errors import AfinaError
from trainer.files import file_manifest, read_owner
from trainer.models.loading import load_tokenizer
from trainer.tracking.files import find_summary, read_metrics, read_summary

COMMAND = "touch EXECUTED"
TEXTS = st.sampled_from(
    [
        *("", "../../x", "/etc/passwd", "/dev/zero", "~/x", "a\nb", "\x00", "\ud800", "${oc.env:HOME}", "${x.y}"),
        *("${", "%s%n", "{{ 7*7 }}", f"$({COMMAND})", f"`{COMMAND}`", f"; {COMMAND}", "x" * 5000, "NaN", "-1", "1e999"),
        *("!!python/object/apply:os.system", "__import__('os').system('touch EXECUTED')", "hydra.utils.call"),
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXTS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(TEXTS, below, max_size=3)),
    max_leaves=6,
)
MANY = settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tried(read: Callable[[], object], *allowed: Path) -> str:
    """Do it; return what it was refused with."""
    said = ""
    with watched() as seen:
        try:
            read()
        except (AfinaError, RowError) as error:
            said = str(error)
    assert harm(seen, *allowed) == []
    assert "\n" not in said
    assert not Path("EXECUTED").exists()
    return said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@MANY
@given(st.dictionaries(st.sampled_from(sorted(config_fields())), VALUES, min_size=1, max_size=3))
def test_any_value_of_a_config(folder: Path, values: dict[str, Any]) -> None:
    tree = yaml.safe_load(to_yaml(load(["run.name=theirs"])))
    for name, value in values.items():
        section, _, key = name.partition(".")
        tree[section][key] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    tried(lambda: load([], file, with_data=False))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"model: !!python/object/apply:os.system ['{COMMAND}']", "could not determine a constructor"),
        (f"model:\n  name_or_path: !!python/object/new:subprocess.Popen [['{COMMAND}']]", "could not determine"),
        ("model:\n  _target_: os.system\n  _args_: [touch EXECUTED]", "model._target_"),
        ("a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk")), "line 2"),
        ("model: " + "[" * 5000, "nested too deep"),
        ("model: " + "{a: " * 3000, "nested too deep"),
        ("x" * 2_000_000, "longer than"),
        ("", "must hold sections"),
        ("\x00", "cannot be read as YAML"),
        ("- 1", "must hold sections"),
        ("5", "cannot be read as YAML"),
        ("'\ud800'", "cannot be read as YAML"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: str, said: str) -> None:
    file = folder / "config.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert said in tried(lambda: load([], file, with_data=False))
    tried(lambda: read_values(file))


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch EXECUTED') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ raise_exception.__globals__['os'].system('touch EXECUTED') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch EXECUTED').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set x = messages|attr('__class__') %}{{ x }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch EXECUTED') }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ range(10**12)|list }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1/0 }}",
    "{{ undefined_thing.x.y }}",
    "{{ messages[99].content }}",
    "{% generation %}{{ messages }}{% endgeneration %}",
    "{{ messages|tojson(indent=100000) }}",
]
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@MANY
@given(st.lists(st.sampled_from([*ATTACKS, PLAIN]), min_size=1, max_size=3), st.booleans())
def test_any_chat_template(folder: Path, tiny_model: Path, parts: list[str], opens: bool) -> None:
    tokenizer = _tokenizer(tiny_model)
    messages = [{"role": "user", "content": "{{ 7*7 }}"}, {"role": "assistant", "content": "49"}]

    def render() -> object:
        template = ChatTemplate(tokenizer, "".join(parts), "data.template=theirs.jinja", "another one")
        return template.render([dict(m) for m in messages], None, opens, {1}, "row 1")

    tried(render)
    assert messages[0]["content"] == "{{ 7*7 }}"


_TOKENIZERS: dict[Path, Any] = {}


def _tokenizer(folder: Path) -> Any:
    if folder not in _TOKENIZERS:
        _TOKENIZERS[folder] = load_tokenizer(str(folder), load([]).model)
    return _TOKENIZERS[folder]


ENTRIES = st.fixed_dictionaries({"bytes": SCALARS, "sha256": SCALARS})
MANIFESTS = st.dictionaries(
    st.sampled_from(["state.json", "../outside", "/dev/zero", "/etc/passwd", "pipe", ".", "", "sub/../../outside"]),
    st.one_of(ENTRIES, st.just({"bytes": 0, "sha256": "0" * 64}), VALUES),
    max_size=3,
)


@MANY
@given(st.one_of(MANIFESTS, VALUES), st.one_of(st.fixed_dictionaries({"resume": VALUES}), VALUES))
def test_any_marker_of_a_checkpoint(folder: Path, marker: Any, state: Any) -> None:
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "pipe").exists():
        os.mkfifo(checkpoint / "pipe")
    (checkpoint / "COMPLETE").write_text(json.dumps(marker))
    (checkpoint / "state.json").write_text(json.dumps(state))
    tried(lambda: find_corruption(checkpoint))
    tried(lambda: find_resume_point(folder, "strict"))
    tried(lambda: find_resume_point(folder, str(checkpoint)))


def test_a_marker_looks_at_no_file_outside(folder: Path) -> None:
    (folder / "outside").write_text("mine")
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (entry,) = file_manifest(folder).values()
    for name in ("../../outside", str(folder / "outside")):
        (checkpoint / "COMPLETE").write_text(json.dumps({name: entry}))
        assert "names a file outside of it" in str(find_corruption(checkpoint))


@MANY
@given(
    st.one_of(
        VALUES.map(json.dumps),
        st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "", "{", '{"step": 1e999}', '{"step": ' + "9" * 5000 + "}"]),
        st.text(max_size=20),
    )
)
def test_any_record_of_a_run(folder: Path, text: str) -> None:
    for name in ("summary.json", "metrics.jsonl", "owner.json"):
        (folder / name).write_bytes(f"{text}\n".encode("utf-8", "surrogatepass"))
    for read in (read_summary, find_summary, read_metrics, read_owner):
        tried(lambda read=read: read(folder))
