"""How a model that a user names is judged: a saved model, a GGUF file beside another, or any other model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coopq.core.files import expanded
from coopq.core.types import ProgressCallback
from coopq.export.checkpoint import SavedModel
from coopq.judge.comparison import compare_plan
from coopq.judge.engines.gguf_files import evaluate_gguf, gguf_window_length
from coopq.judge.evaluation import NO_REFERENCE, evaluate_model, evaluate_saved, window_length
from coopq.judge.mixes import judge_mix
from coopq.judge.results import Comparison, Evaluation
from coopq.model.sources.gguf import gguf_file
from coopq.model.texts import HeldOut


@dataclass(frozen=True)
class Judge:
    """A model to judge.

    Attributes:
        model: Folder of a saved model, a GGUF file, or any name as in `coopq.model.load.load_model`.
        reference: The original; None for the model of a saved model's plan, `NO_REFERENCE` for none. llama.cpp computes
            if the model and the reference are GGUF files.
        run: Run folder of a saved model.
        is_compared: Whether a saved model is compared with the original, uniform widths, random widths and a mix.
        device: Where to compute.
    """

    model: str
    reference: str | None
    run: Path
    is_compared: bool
    device: str

    def window_length(self) -> int:
        """Tokens of a window if nobody says how many."""
        files = self._gguf_files()
        return window_length(self.model) if files is None else gguf_window_length(*files)

    def judge(self, text: HeldOut, progress: ProgressCallback) -> tuple[Evaluation, list[Comparison]]:
        """The evaluation on a text, and the rows of a saved model's comparison.

        Args:
            text: The text.
            progress: Told of every step.
        """
        if (files := self._gguf_files()) is not None:
            return evaluate_gguf(*files, text, progress), []
        saved = SavedModel(expanded(self.model))
        options: dict[str, Any] = {"device": self.device, "progress": progress}
        if not saved.exists:
            reference = None if self.reference == NO_REFERENCE else self.reference
            return evaluate_model(self.model, text, reference=reference, **options), []
        evaluation = evaluate_saved(saved.folder, self.run, text, reference=self.reference, **options)
        if not self.is_compared or self.reference == NO_REFERENCE:
            return evaluation, []
        rows = compare_plan(saved.plan, self.run, text, model=self.reference, **options)
        mix = judge_mix(saved.plan, self.run, text, reference=self.reference, **options)
        return evaluation, rows if mix is None else [*rows, mix]

    def _gguf_files(self) -> tuple[Path, Path] | None:
        """The model and the reference if both are GGUF files."""
        if self.reference is None or self.reference == NO_REFERENCE:
            return None
        model, reference = gguf_file(self.model), gguf_file(self.reference)
        return None if model is None or reference is None else (model, reference)
