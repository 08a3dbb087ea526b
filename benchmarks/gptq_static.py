"""GPTQ on inputs of the full-precision model against GPTQ layer after layer: cost, and quality of the saved models.

    python benchmarks/gptq_static.py            # half an hour on one core; resumes

The active search makes plans with the weights of `gptq` and of `gptq-static`, 2 and 4 bits by block. The models of the
plans are saved and judged on WikiText-2. Writes docs/results/gptq_static.md.
"""

from _common import RESULTS, WORK, cpu_seconds, loss_above, perplexity, table, write_models_report
from _models import full_precision_losses, measured_plans, saved_losses, saved_model, session_on, source_of
from coopq.core.files import read_json, write_json
from coopq.core.specs import Request
from coopq.core.types import Losses
from coopq.model.texts import HeldOut
from coopq.plan.plan import Plan

MODELS, BACKENDS = ("llama", "qwen"), ("gptq", "gptq-static")
TOKENS, LENGTH = 4096, 512
BUDGETS = ("2avg", "2.25avg", "2.5avg", "3avg", "3.5avg", "4avg")
GROUP, JUDGE_TOKENS, WINDOW = 64, 32768, 512


def request_of(model: str, backend: str) -> Request:
    """What is searched."""
    return Request.from_options(
        model=source_of(model),
        backend=backend,
        group_size=GROUP,
        bits=(2, 4),
        tokens=TOKENS,
        sequence_length=LENGTH,
    )


def save_models(model: str, backend: str) -> tuple[float | None, dict[str, tuple[Plan, Losses]]]:
    """Save a model at each budget.

    Returns:
        Processor time for the weight bank, seconds, or None if making the bank was interrupted; for each budget the
        plan of the saved model, and the saved model's losses on WikiText-2.
    """
    folder = WORK / "gptq_static" / f"{model}-{backend}"
    timed, is_new, start = folder / "seconds.json", not folder.exists(), cpu_seconds()
    with session_on(request_of(model, backend), folder) as session:
        if not timed.exists():
            write_json(timed, cpu_seconds() - start if is_new else None)
        plans = zip(BUDGETS, measured_plans(session, "active", BUDGETS), strict=True)
        saved = {budget: saved_model(session, plan, folder / budget) for budget, plan in plans}
        text = HeldOut(WINDOW, JUDGE_TOKENS).windows(session.loaded.tokenizer).tokens
    return read_json(timed), {budget: (one.plan, saved_losses(one.folder, text)) for budget, one in saved.items()}


def describe(model: str) -> list[str]:
    """The report of a model."""
    (before, by_gptq), (after, by_static) = (save_models(model, backend) for backend in BACKENDS)
    rows = []
    for budget in BUDGETS:
        (plan, losses), (static, static_losses) = by_gptq[budget], by_static[budget]
        cells = [budget, f"{plan.measured_loss:.4f}", f"{plan.saved_loss:.4f}", perplexity(losses)]
        cells += [f"{static.measured_loss:.4f}", "the same", perplexity(static_losses)]
        rows.append([*cells, loss_above(static_losses, losses)])
    taken = "The bank of both widths was interrupted, so its time is not known."
    if before is not None and after is not None:
        taken = f"The bank of both widths took {before:.0f} seconds of the processor by `gptq`,\n"
        taken += f"{after:.0f} by `gptq-static`: {after / before:.2f} times."
    head = [f"{backend}: {column}" for backend in BACKENDS for column in ("measured", "saved", "perplexity")]
    return [
        "",
        f"## {model}",
        "",
        f"In full precision {perplexity(full_precision_losses(model, WINDOW, JUDGE_TOKENS))}. {taken}",
        "",
        *table(["budget", *head, "difference"], rows),
    ]


def main() -> None:
    """Measure the models that are named, and write the report."""
    head = [
        "Written by `python benchmarks/gptq_static.py`: 2 and 4 bits by block, groups of",
        f"{GROUP}, active search on {TOKENS // LENGTH} x {LENGTH} tokens of C4, saved models judged on the first",
        f"{JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}; at 2avg all blocks have 2 bits.",
        "Measured: the loss on the calibration tokens of the weights that were searched; saved: of the weights that",
        "the saved model has. Differences: `gptq-static` less `gptq`, nats per token, 95 %, paired bootstrap over",
        "windows.",
    ]
    write_models_report(__doc__, RESULTS / "gptq_static.md", head, describe, MODELS)


if __name__ == "__main__":
    main()
