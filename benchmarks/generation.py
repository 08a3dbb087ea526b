"""Tokens per second of processor time of a saved model: packed, dequantized, and the original.

    python benchmarks/generation.py            # minutes on one core

The demo model, rtn, 4 bits. Each form generates in a process of its own. Writes docs/results/generation.md.
"""

import json
import time
from pathlib import Path

import torch

import coopq
from _common import RESULTS, WORK, command_line, processor, resident_bytes, run_alone, table, write_report
from coopq.core.specs import Request
from coopq.model.load import load_model

MODEL, N_TOKENS, N_PACKED = "demo", 64, 10
"""The model, and the tokens that are generated: by the packed model fewer, as it is slow."""
FORMS = ("original", "packed", "dequantized")
PROMPT = "The capital of France is"


def generate(form: str, saved: Path) -> None:
    """Generate by one form, and print tokens per second, the resident bytes and the text as JSON."""
    torch.set_num_threads(1)  # so that processor time is what one core takes
    original = load_model(MODEL, device="cpu")
    ids = original.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model, tokenizer = original.model, original.tokenizer
    if form != "original":
        del original, model
        model = coopq.load(saved, device="cpu", dequantize=form == "dequantized")
    n_tokens = N_PACKED if form == "packed" else N_TOKENS
    options = {"do_sample": False, "use_cache": True}
    model.generate(ids, max_new_tokens=1, **options)
    start = time.process_time()
    found = model.generate(ids, min_new_tokens=n_tokens, max_new_tokens=n_tokens, **options)
    seconds = time.process_time() - start
    text = tokenizer.decode(found[0, ids.shape[1] :][:N_PACKED])
    print(json.dumps({"rate": n_tokens / seconds, "bytes": resident_bytes("VmRSS"), "text": text}))


def main() -> None:
    """Measure all forms, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("form", nargs="?", choices=FORMS, help="measure this form alone, in this process")
    form, saved = parser.parse_args().form, WORK / "generation" / "saved"
    if form is not None:
        generate(form, saved)
        return
    request = Request.from_options(model=MODEL, bits=(3, 4), tokens=128, sequence_length=128)
    coopq.quantize(request, coopq.Goal(budget="4avg", method="first-last"), saved)
    rows = []
    for name in FORMS:
        found = run_alone(__file__, name)
        rows.append([name, f"{found['rate']:.2f}", f"{found['bytes'] / 1e6:,.0f}", found["text"].replace("\n", " ")])
    lines = [
        f"Written by `python benchmarks/generation.py` on one {processor()}: SmolLM2-135M-Instruct by rtn at 4 bits,",
        f"in float32, greedy, {N_TOKENS} tokens ({N_PACKED} by the packed model), by processor time. `packed` is",
        "`coopq.load(folder, dequantize=False)`, `dequantized` is `dequantize=True`.",
        "",
        *table(["form", "tokens per second", "resident MB", f"first {N_PACKED} tokens"], rows),
    ]
    write_report(RESULTS / "generation.md", lines)


if __name__ == "__main__":
    main()
