"""Complete what is typed on the command line in a shell: groups, options, keys, their values, runs. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainer.cli.folders import RUNS
from trainer.tracking.files import CONFIG_FILE

Found = list[tuple[str, str]]

# Both ask for whole words, as fish does: a value and a tab and its meaning a line. bash ends a word at =, so what it
# has of the word already is taken off; neither puts a space behind what goes on (key=, section., folder/).
BASH = r"""
%(complete_func)s() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} word
    COMPREPLY=( $(env _TYPER_COMPLETE_ARGS="$line" _TYPER_COMPLETE_FISH_ACTION=get-args \
        %(autocomplete_var)s=complete_fish $1 2>/dev/null | cut -f 1) )
    word=${line##*[[:space:]]}
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=( "${COMPREPLY[@]#"${word%%"${word##*=}"}"}" )
    fi
    if [[ ${COMPREPLY[0]} == *[=./] ]]; then compopt -o nospace; fi
}
complete -o default -F %(complete_func)s %(prog_name)s
"""
ZSH = r"""
#compdef %(prog_name)s

%(complete_func)s() {
    local line value
    local -a open closed
    for line in "${(@f)$(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _TYPER_COMPLETE_FISH_ACTION=get-args \
        %(autocomplete_var)s=complete_fish %(prog_name)s 2>/dev/null)}"; do
        value=${${line%%%%$'\t'*}//:/\\:}
        [[ $line == *$'\t'* ]] && line=$value:${line#*$'\t'} || line=$value
        case $value in
            ("") ;;
            (*[=./]) open+=("$line") ;;
            (*) closed+=("$line") ;;
        esac
    done
    if (( $#open + $#closed )); then
        _describe -V '' open -S '' -- closed
    else
        compset -P '*='
        _files
    fi
}
compdef %(complete_func)s %(prog_name)s
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}


def complete_override(incomplete: str) -> Found:
    """Return what an override may go on with: ``zero=``, ``zero.``, ``zero.stage=``, ``zero=stage3``; several values
    of a sweep, too. Each with its meaning."""
    name, equals, typed = incomplete.partition("=")
    if equals:
        before, comma, _ = typed.rpartition(",")
        return [(f"{name}={before}{comma}{value}", "") for value in _values(name)]
    return sorted(_names(name))


def complete_run(incomplete: str) -> Found:
    """Return the runs in ``runs/`` by name, by path where that is how the word begins."""
    return _in_runs(incomplete, [path.parent for path in RUNS.glob(f"*/{CONFIG_FILE}")])


def complete_folder(incomplete: str) -> Found:
    """Return the runs, sweeps and comparisons in ``runs/``, as :func:`complete_run` does."""
    return _in_runs(incomplete, [path for path in RUNS.glob("*") if path.is_dir()])


def complete_embedded(incomplete: str) -> Found:
    """Return the embedded models."""
    from trainer.models.embedded import EMBEDDED

    return [(name, "") for name in EMBEDDED]


def _in_runs(incomplete: str, folders: Iterable[object]) -> Found:
    whole = incomplete.startswith(f"{RUNS}/")
    return sorted((str(folder) if whole else str(folder).removeprefix(f"{RUNS}/"), "") for folder in folders)


def _names(typed: str) -> Iterator[tuple[str, str]]:
    from trainer.config import groups, keys

    if "." in typed:
        yield from ((f"{key.name}=", key.help.split(";")[0]) for key in keys())
        return
    yield from ((f"{group}=", ", ".join(options)) for group, options in groups().items())
    yield from {(f"{key.name.partition('.')[0]}.", "keys") for key in keys()}


def _values(name: str) -> tuple[str, ...]:
    """Return the values that a group or key can have, as far as they can be listed."""
    from trainer.config import groups
    from trainer.config.dataset_spec import TEMPLATES
    from trainer.config.messages import one_line
    from trainer.config.rules.evaluation import MONITORED_METRICS
    from trainer.config.rules.targets import PARAMETER_SETS, TARGET_SETS
    from trainer.config.schema import GRADIENT_CHECKPOINTING
    from trainer.config.suggestions import NULLABLE_GROUPS, config_fields

    if name in groups():
        return (*groups()[name], *(["null"] if name in NULLABLE_GROUPS else []))
    spec = config_fields().get(name)
    if spec is None:
        return ()
    others = {
        "data.template": TEMPLATES,
        "eval.best_metric": MONITORED_METRICS,
        "method.target_modules": TARGET_SETS,
        "method.target_parameters": PARAMETER_SETS,
        "model.gradient_checkpointing": GRADIENT_CHECKPOINTING,
        "model.kernels": ("auto", "none"),
        "checkpoint.resume": ("auto", "strict", "never"),
        "sweep.parallel": ("auto",),
        "sweep.fuse": ("auto", "off"),
    }
    listed = (True, False) if spec.base is bool else spec.field.metadata.get("choices") or others.get(name, ())
    return (*map(one_line, listed), *(["null"] if listed and spec.optional else []))
