"""What a run keeps of its data: the rows that it left out, and a chat template of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.warm import afina

OWN = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '<|endoftext|>' }}{% endfor %}[assistant] "
OWN = OWN.replace("[assistant] ", "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}")


def test_a_run_outlives_its_template_file_and_its_cache(tmp_path: Path, tiny_model: Path) -> None:
    data, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    rows = [json.dumps({"instruction": f"Say {i}.", "output": str(i)}) for i in range(20)]
    data.write_text("\n".join([*rows, '{"instruction": "x"}', "broken"]))
    template.write_text(OWN)
    common = [
        f"model.name_or_path={tiny_model}",
        f"data.path={data}",
        f"data.template={template}",
        f"run.dir={tmp_path}",
    ]
    common += [
        "model.dtype=fp32",
        "batch.global_size=4",
        "batch.max_steps=2",
        "data.validation=4",
        "run.name=a",
        "log.wandb=off",
    ]
    refused = afina("train", *common, check=False)
    assert refused.returncode == 2
    assert "data.max_refused=0: 2 of 22 rows cannot be used: rows.jsonl:21" in refused.output
    assert "Traceback" not in refused.output
    afina("train", *common, "data.max_refused=2")
    run = tmp_path / "a"
    kept = [json.loads(line) for line in (run / "refused.jsonl").read_text().splitlines()]
    assert [(row["where"], row["reason"]) for row in kept] == [
        ("rows.jsonl:21", "missing_field"),
        ("rows.jsonl:22", "broken_json"),
    ]
    template.unlink()
    for adapter in ([], ["--no-adapter"]):
        afina("generate", run, "Say 3.", *adapter, "generate.max_new_tokens=3")
    scores = afina("eval", run, "eval.metrics=[loss]").output
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['metrics']['eval_loss']:.4f}" in scores
