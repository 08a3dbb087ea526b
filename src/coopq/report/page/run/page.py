"""The page of a run: what was chosen, why, how sure, at what cost, and how to repeat it."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from coopq.core.recipes import ENGINES, RECIPES
from coopq.core.types import UNTOUCHED
from coopq.export.formats import FORMS
from coopq.judge.references import MIX, ORIGINAL
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan
from coopq.report.judged import evaluation_lines, judged_cells
from coopq.report.page.document import Figure, Section, code, details, facts, paragraph, save_page, table
from coopq.report.page.provenance import provenance
from coopq.report.page.run.figures import predicted_figure, search_figure, size_figure
from coopq.report.page.run.maps import pair_map, sensitivity_map, width_map
from coopq.report.page.run.record import RunRecord, read_run
from coopq.report.words import LOSS_NAMES, megabytes, score_text, with_half

_MOST_PAIRS = 12


def save_run_page(plan: Plan, run: Path | None, out: str | None, path: Path) -> Path:
    """Write the page of a plan.

    Args:
        plan: The plan.
        run: The run folder; None if it is gone, then what was measured on the way is missing.
        out: Name of what was made of the plan, for commands; None if nothing was.
        path: The HTML file.
    Returns:
        The path.
    """
    record = read_run(plan, run)
    title = f"{plan.request.model.source} at {plan.bits_per_weight:.2f} bits per weight"
    widths = plan.request.widths
    subtitle = (
        f"CoopQ report. Method {plan.method}, backend {plan.quantizer.backend}, {len(plan.players)} layers "
        f"({widths.granularity}) with {widths.text} bits"
    )
    return save_page(path, title, subtitle, run_sections(record, out))


def run_sections(record: RunRecord, out: str | None) -> Iterator[Section]:
    """The sections of the page; those without data are left out. Arguments as of `save_run_page`."""
    plan = record.plan
    yield Section("The answer", _answer(record, out))
    if record.judged:
        yield Section("How good is it on text that no search saw?", list(_judged(record)))
    if len(record.measured.losses) > 1 and plan.measured_loss is not None:
        yield Section("Which loss does each size have?", [Figure("size", size_figure(record), _size_caption(record))])
    yield Section("Which layers have which widths, and why?", _layers(record))
    yield Section("How sure is the choice?", _confidence(record))
    if record.pairs is not None:
        yield Section("Which layers act together?", _interactions(record))
    yield Section("What did the search do?", _search(record))
    yield Section("How can this be repeated?", provenance(plan, out or "OUT", record.engine))


def _answer(record: RunRecord, out: str | None) -> list[str]:
    plan = record.plan
    loss, unit = LOSS_NAMES[plan.request.search.loss], "nats per token"
    sure, n = plan.confidence, plan.request.text.n_sequences
    half = None if sure is None else sure.half
    measured = "not measured" if plan.measured_loss is None else f"{plan.measured_loss:.4g}"
    if plan.measured_loss is not None and half is not None:
        measured = with_half(plan.measured_loss, half)
    form = plan.request.target.form
    boxes = [
        ("model", plan.request.model.source, f"backend {plan.quantizer.backend}"),
        (
            "size of the file",
            megabytes(plan.file_bytes),
            f"asked for {plan.asked}; quantized {megabytes(plan.bytes)} of at most {megabytes(plan.budget_bytes)}",
        ),
        (
            "bits per weight",
            f"{plan.bits_per_weight:.3f}",
            "of the quantized part"
            + ("" if plan.keeps_quantized else f"; {plan.average_bits:.3f} without scales and zeros"),
        ),
        (
            loss,
            measured,
            f"{unit}, 95 % interval over {n} calibration sequences" if half is not None else unit,
        ),
        *_judged_box(record),
        ("engine", "transformers" if form is None else FORMS[form].engine, f"export form: {form or 'CoopQ packed'}"),
    ]
    parts = [facts(boxes)]
    if (uniform := _uniform_sentence(record)) is not None:
        parts.append(paragraph(uniform))
    if plan.saved_loss is not None:
        parts.append(
            paragraph(f"The saved model's own negative log-likelihood is {plan.saved_loss:.4f} nats per token.")
        )
    if plan.stopped_after is not None:
        stopped = (
            f"The search was stopped after {plan.stopped_after}. Without the limit the same command goes on."
            if plan.stop_options
            else f"The search was interrupted after {plan.stopped_after}; the same command goes on."
        )
        parts.append(paragraph(stopped))
    if out is None:
        made = shlex.join(["coopq", "apply", record.file, "--out", "OUT"])
        return [*parts, paragraph("No model is saved of this plan; this command makes one:"), code(made)]
    return [*parts, paragraph("Run the model:"), code(_commands(record, out))]


def _judged_box(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """The divergence on the first text of `coopq evaluate`."""
    for judged in record.judged[:1]:
        evaluation = judged.evaluation
        if (divergence := evaluation.divergence) is not None:
            original = [row.perplexity for row in judged.rows if row.method == ORIGINAL]
            beside = f", {original[0]:.2f} by the original" if original else ""
            mean, interval = divergence.mean.value, divergence.mean.interval
            value = f"{mean:.2g}" if interval is None else with_half(mean, float(np.ptp(interval)) / 2)
            yield ("KL divergence on unseen text", value, f"perplexity {evaluation.perplexity:.2f}{beside}")


def _judged(record: RunRecord) -> Iterator[str]:
    """What `coopq evaluate` found out, text by text."""
    for judged in record.judged:
        yield from map(paragraph, evaluation_lines(judged.evaluation))
        if judged.rows:
            yield table(*judged_cells(judged.rows))
            yield paragraph(
                "KL is the divergence from the original, nats per token. Same top is the share of tokens with the "
                "same most likely token. ± is half of the 95 % interval over windows."
            )


def _commands(record: RunRecord, out: str) -> str:
    """How to run what the job made."""
    target = record.plan.request.target
    if record.engine is not None:
        return RECIPES[record.engine].command(out)
    if target.form is None:
        return f"import coopq\nmodel = coopq.load({out!r})  # a transformers model"
    name = f"{out}.gguf" if target.form == "gguf" else f"{out}-{target.form}"
    words = ["coopq", "export", out, "--to", target.form, "--out", name]
    run = [RECIPES[engine].command(name) for engine in ENGINES if RECIPES[engine].form == target.form]
    return "\n".join([shlex.join([*words, "--base", target.base] if target.base else words), *run])


def _uniform_sentence(record: RunRecord) -> str | None:
    """The choice beside the uniform widths next in size; None if the choice is not measured."""
    points, plan = record.measured, record.plan
    if plan.measured_loss is None:
        return None
    is_uniform = (points.assignments == points.assignments[:, :1]).all(axis=1)
    rows = np.flatnonzero(is_uniform & (points.assignments != UNTOUCHED).all(axis=1))
    if not len(rows):
        return "Uniform widths are not measured in this run; coopq evaluate measures them, and writes this page again."
    sizes, losses = record.bits_per_weight(points.n_bytes[rows]), points.losses[rows]
    order = np.argsort(sizes)
    names = [
        f"{points.assignments[row][0]:g} bits for every layer ({size:.3f} bits per weight) have a loss of {loss:.4g}"
        for row, size, loss in zip(rows[order], sizes[order], losses[order], strict=True)
    ]
    above = int(np.searchsorted(sizes[order], plan.bits_per_weight))
    text = f"Uniform widths: {'; '.join(names[max(0, above - 1) : above + 1])}."
    if not 0 < above < len(order) or losses.min() <= 0:
        return text
    between = float(np.exp(np.interp(plan.bits_per_weight, sizes[order], np.log(losses[order]))))
    change = plan.measured_loss / between - 1
    return (
        f"{text} Interpolated between the two at the size of the choice, by the logarithm of the loss: {between:.4g}. "
        f"The choice has {abs(change):.0%} {'less' if change < 0 else 'more'}."
    )


def _size_caption(record: RunRecord) -> str:
    uniform = "Squares are uniform widths. " if "for every layer" in str(_uniform_sentence(record)) else ""
    if any(row.method == MIX for judged in record.judged for row in judged.rows):
        uniform += "The triangle is llama.cpp's mix of the nearest file size. "
    return (
        f"Each grey point is one of {len(record.measured.losses)} measured assignments of widths to layers. The blue "
        f"line is the lowest loss measured up to a size. {uniform}Lower is better; left is smaller."
    )


def _layers(record: RunRecord) -> list[str | Figure]:
    plan = record.plan
    runner_up = " A ringed dot marks layers that have another width in the runner-up." if plan.runner_up else ""
    own = " 16 is a layer as in the model's own file, which has fewer bits." if plan.keeps_quantized else ""
    caption = f"Width of each layer. Hover or tap for the layer's name.{own}{runner_up}"
    parts: list[str | Figure] = [Figure("widths", width_map(record), caption)]
    scores, meaning = [player.score for player in plan.players], score_text(plan.method)
    if max(scores) > min(scores):
        caption = f"Cost of lowering each layer: {meaning}. Layers in strong colours need more bits."
        parts.append(Figure("sensitivity", sensitivity_map(record, "cost of lowering"), caption))
    rows = [
        (
            str(name),
            "as in the base" if player.bits == UNTOUCHED and plan.keeps_quantized else f"{player.bits:g}",
            f"{player.score:.4g}",
            f"{player.n_bytes[f'{player.bits:g}'] / 1e6:.3f}",
            f"{plan.runner_up[i]:g}" if plan.runner_up else "",
        )
        for i, (name, player) in enumerate(zip(record.names, plan.players, strict=True))
    ]
    rows.sort(key=lambda row: -float(row[2]))
    head = ("layer", "bits", "cost of lowering", "MB", "runner-up's bits")
    return [*parts, details(f"All {len(rows)} layers, the most sensitive first", table(head, rows))]


def _confidence(record: RunRecord) -> list[str | Figure]:
    plan, sure = record.plan, record.plan.confidence
    parts: list[str | Figure] = []
    if plan.measured_loss is None:
        parts.append(paragraph("The loss of this plan is not measured, so nothing says how sure the choice is."))
    elif sure is None or sure.difference is None or sure.interval is None or sure.probability is None:
        parts.append(
            paragraph("No other measured assignment of this size differs in 5 % of the weights: there is no runner-up.")
        )
    else:
        low, high = sure.interval
        verdict = "the two cannot be told apart on this text" if low <= 0 <= high else "the difference is clear"
        parts.append(
            paragraph(
                "The runner-up is the best measured assignment with other widths for at least 5 % of the weights. Its "
                f"loss minus that of the choice is {sure.difference:+.4f} nats per token (95 % interval {low:+.4f} to "
                f"{high:+.4f}): {verdict}. The choice is the better one with probability {sure.probability:.0%}. Both "
                f"numbers are from a bootstrap over {plan.request.text.n_sequences} sequences, corrected for selection."
            )
        )
    if plan.solver is not None:
        parts.append(paragraph(f"The method's program is solved: {plan.solver.status}, gap {plan.solver.gap:.2%}."))
    if plan.fidelity is not None and plan.fidelity.n_points > 1:
        rank = plan.fidelity.rank_correlation
        trust = "" if plan.fidelity.is_trusted else " Trust measured losses, not predicted ones."
        parts.append(
            paragraph(
                f"The surrogate of {plan.fidelity.n_points} losses misses left-out losses by "
                f"{plan.fidelity.error:.4f} nats per token (root mean square near the budget) and ranks them with a "
                f"correlation of {'unknown' if rank is None else f'{rank:.2f}'}.{trust}"
            )
        )
    if record.predicted is not None and np.isfinite(record.predicted).sum() > 1:
        caption = "Each point is a measured loss and its prediction by a surrogate that was fitted without it."
        parts.append(Figure("predicted", predicted_figure(record), caption, is_square=True))
    return parts


def _interactions(record: RunRecord) -> list[str | Figure]:
    assert record.pairs is not None
    values = record.pairs.values
    if not np.abs(values).max(initial=0.0) > 0:
        return [paragraph("The fit has no pair terms: single layers predict left-out losses as well without them.")]
    first, second = np.triu_indices(len(values), 1)
    order = np.argsort(-np.abs(values[first, second]), kind="stable")[:_MOST_PAIRS]
    rows = [
        (str(record.names[first[i]]), str(record.names[second[i]]), f"{values[first[i], second[i]]:+.3g}")
        for i in order
    ]
    caption = (
        f"Sum of the pair terms between two blocks, {record.pairs.unit}. Orange: lowering both costs more than the two "
        "alone. Blue: less."
    )
    n = len(record.searched.losses)
    fitted = (
        "The paper's program takes this covariance for interactions."
        if METHODS[record.plan.method].kind == "walks"
        else f"These terms are fitted to {n} losses; with few losses they are hints, not measurements."
    )
    return [
        paragraph(fitted),
        Figure("pairs", pair_map(record, record.pairs), caption, is_square=True),
        paragraph(f"The strongest pairs of layers ({record.pairs.unit}):"),
        table(("layer", "with layer", record.pairs.unit), rows),
    ]


def _search(record: RunRecord) -> list[str | Figure]:
    plan, points = record.plan, record.searched
    n_blocks = len({player.block for player in plan.players})
    shared = plan.block_forwards_unshared / plan.block_forwards if plan.block_forwards else 1.0
    cost = (
        f"The method takes {plan.block_forwards / n_blocks:,.1f} forwards of the model over "
        f"{plan.request.text.tokens:,} calibration tokens ({plan.block_forwards:,} block forwards; sharing "
        f"prefixes saves a factor of {shared:.2f})."
    )
    parts: list[str | Figure] = [] if plan.is_interrupted else [paragraph(cost)]
    fits = np.flatnonzero(points.n_bytes <= plan.budget_bytes)
    if len(fits) > 1 and METHODS[plan.method].kind == "search":
        best = int(fits[np.argmin(points.losses[fits])])
        scoring = f" after {record.scoring:.0f} forwards for the gradient score" if record.scoring else ""
        caption = (
            f"{len(points.losses)} losses were measured{scoring}; {len(fits)} keep the budget. The first plan is "
            f"number {fits[0] + 1}, the best is number {best + 1}. The blue line is the best loss so far."
        )
        parts.append(Figure("search", search_figure(record), caption))
    return parts
