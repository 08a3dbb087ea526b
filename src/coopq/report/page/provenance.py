"""What a stranger needs to repeat a run: the command, the versions, the text, the seeds, the fingerprints."""

import json
import shlex
from typing import Any

from coopq.core.recipes import OWN, RECIPES
from coopq.core.specs import request_words
from coopq.core.versions import installed
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan
from coopq.report.page.document import code, paragraph, table


def command(plan: Plan, out: str, engine: str | None = None) -> str:
    """The command line that makes a plan for an engine; options at their defaults are left out, a recipe's are not."""
    words = ["coopq", "quantize", *request_words(plan.request, RECIPES[engine or OWN].settings)]
    words += [] if engine is None else ["--for", engine]
    return shlex.join([*words, *plan.goal_words, "--out", out])


def provenance(plan: Plan, out: str, engine: str | None) -> list[str]:
    """The parts of the section on provenance."""
    request, text = plan.request, plan.request.text
    fingerprint = plan.fingerprint
    bos = "each after a BOS token" if fingerprint.get("bos") else "no special tokens"
    rows = [
        ("model", request.model.source),
        ("calibration text", f"{text.n_sequences} x {text.sequence_length} tokens of {text.source}, {bos}"),
        ("seeds", f"{text.seed} for the text, {request.search.seed} for the search"),
        ("method", f"{plan.method}: {METHODS[plan.method].summary}"),
        *((f"fingerprint: {name}", _plain(value)) for name, value in fingerprint.items() if name != "bos"),
        ("this page was made by", installed()),
    ]
    return [
        paragraph("This command repeats the run. Fingerprints are hashes; equal hashes mean equal weights and tokens."),
        code(command(plan, out, engine)),
        table(("what", "value"), rows),
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
