"""Held-out loss of a model, by plain transformers: rows padded, fp32, cross-entropy in sum over label tokens.

python benchmarks/_score.py MODEL ADAPTER-or-none ROWS.npz RESULT.json

Nothing of afina takes part: whoever trained the model, it is read and scored here in the same way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks._peer import load_rows

ROWS_A_FORWARD = 20


def main(model_folder: str, adapter: str, rows_file: Path, result_file: Path) -> None:
    """Write the loss a label token and how many there are."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if adapter != "none":
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    rows = sorted(load_rows(rows_file), key=lambda row: len(row[0]))
    total, count = 0.0, 0
    with torch.no_grad():
        for begin in range(0, len(rows), ROWS_A_FORWARD):
            batch = rows[begin : begin + ROWS_A_FORWARD]
            width = max(len(ids) for ids, _ in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            seen = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)
            for k, (row, loss_mask) in enumerate(batch):
                ids[k, : len(row)], seen[k, : len(row)] = torch.from_numpy(row).long(), 1
                labels[k, : len(row)] = ids[k, : len(row)].masked_fill(~torch.from_numpy(loss_mask), -100)
            logits = model(input_ids=ids, attention_mask=seen).logits
            flat, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            total += float(torch.nn.functional.cross_entropy(flat, wanted, reduction="sum"))
            count += int((wanted != -100).sum())
    result_file.write_text(json.dumps({"loss": total / count, "label_tokens": count}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(Path(name) for name in sys.argv[3:]))
