"""The report of llama_mixes.py: our GGUF files beside llama.cpp's mixes, and beside the strongest of these."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from _common import loss_above, perplexity, table
from _llama_cpp import Judged, describe_types, engine_name
from coopq.core.specs import Request
from coopq.core.types import Losses


def describe_strongest(
    made: Mapping[tuple[str, str], Path], ours: Mapping[str, Path], divergence: Mapping[Path, Losses]
) -> list[str]:
    """The table of our files beside the mix, with whatever type of the embedding, that diverges least at each size."""
    rows = []
    for mix, file in ours.items():
        most = made[mix, ""].stat().st_size
        rivals = {names: rival for names, rival in made.items() if rival.stat().st_size <= most}
        (name, kind), rival = min(rivals.items(), key=lambda item: float(divergence[item[1]].mean()))
        rows.append(
            [
                f"{most:,}",
                name + (f", embedding {kind}" if kind else ""),
                f"{rival.stat().st_size:,}",
                f"{file.stat().st_size:,}",
                f"{divergence[rival].mean():.4f}",
                f"{divergence[file].mean():.4f}",
                loss_above(divergence[file], divergence[rival]),
            ]
        )
    columns = ["bytes at most", "strongest mix", "its bytes", "our bytes", "its divergence", "our divergence"]
    return [
        f"The strongest of {len(made)} files of llama.cpp's mixes, the mix's own type of the embedding or another:",
        "of those no larger than each size the one that diverges least on these windows of WikiText-2. The choice in",
        "hindsight favours the mixes. The last column is our divergence less theirs, nats per token, with a paired 95",
        "% interval.",
        "",
        *table([*columns, "our divergence above"], rows),
    ]


def describe(
    command: str,
    request: Request,
    base: Path,
    pairs: Mapping[str, tuple[Path, Path]],
    judged: Sequence[Judged],
    *,
    in_two_forms: bool,
) -> list[str]:
    """The report.

    Args:
        command: What makes the report.
        request: How our files were searched.
        base: The model's own file.
        pairs: The file of each mix, and our file of the same size.
        judged: Losses of all files on WikiText-2, Wikipedia and C4.
        in_two_forms: Whether half of the calibration text has the form of WikiText-2.
    """
    losses, divergences = [], []
    for mix, pair in pairs.items():
        sizes = [f"{file.stat().st_size:,}" for file in pair]
        perplexities = [perplexity(judged[0].nll[file]) for file in pair]
        above = [loss_above(text.nll[pair[1]], text.nll[pair[0]]) for text in judged]
        losses.append([mix, *sizes, *perplexities, *above])
        divergences.append([mix, *(f"{text.divergence[file].mean():.4f}" for text in judged for file in pair)])
    loss_columns = ["llama.cpp's mix", "its bytes", "our bytes", "its perplexity", "ours", "our loss above"]
    divergence_columns = ["llama.cpp's mix", "WikiText-2: its divergence", "ours", "Wikipedia: its", "ours"]
    text, of_base = request.text, judged[0].nll[base]
    return [
        f"Written by `{command}`: {request.quantizer.backend},",
        f"{request.widths.text} bits,",
        f"active search by divergence on {text.n_sequences} x {text.sequence_length} tokens of",
        f"{Path(text.source).name}, for all sizes together. Perplexities by llama.cpp",
        f"({engine_name()}) on {len(of_base)} windows of {text.sequence_length} tokens of",
        f"WikiText-2; that of the model's own file, {base.stat().st_size:,} bytes, {describe_types(base)}, is",
        f"{perplexity(of_base)}; where a mix is larger, ours is that file.",
        "The columns from 'our loss above' on are the loss of CoopQ's file less the loss of the mix, nats per",
        "token, with paired 95 % intervals, on WikiText-2 and on as many windows of Wikipedia and of C4. No search",
        "sees these windows.",
        "WikiText-2 sets spaces around punctuation, which these texts do not"
        + (", and half of what is searched on does." if in_two_forms else "."),
        "",
        *table([*loss_columns, "on Wikipedia", "on C4"], losses),
        "",
        "KL divergence of llama.cpp's predictions from those of the model's own file, nats per token. On a text of the",
        "model's own kind that is what quantization loses; on another kind some of its damage may lower the loss.",
        "",
        *table([*divergence_columns, "C4: its", "ours"], divergences),
    ]
