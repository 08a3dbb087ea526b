"""The model in full precision that some forms start from."""

from dataclasses import dataclass
from pathlib import Path

from coopq.core.errors import Mismatch
from coopq.core.files import expanded
from coopq.core.specs import Request
from coopq.core.types import ProgressCallback
from coopq.model.load import LoadedModel, fingerprint_weights, load_model
from coopq.plan.plan import Plan


@dataclass(frozen=True)
class BaseModel:
    """The model of a plan in full precision.

    Attributes:
        path: The model in the engine's own form: a GGUF file, or a folder of OpenVINO; None if none is named.
        source: The model as coopq loads it; see `coopq.core.specs.ModelSpec`.
    """

    path: Path | None
    source: str

    @classmethod
    def find(cls, request: Request, path: Path | None = None, source: str | None = None) -> "BaseModel":
        """The base that is named, or else the base that a request names.

        Args:
            request: What the plan was made for.
            path: The model in the engine's own form.
            source: Where the model is now.
        """
        asked = request.target.base
        return cls(path or (None if asked is None else expanded(asked)), source or request.model.source)

    def load(self, plan: Plan, progress: ProgressCallback) -> LoadedModel:
        """Load the model on the CPU.

        Args:
            plan: A plan of the model.
            progress: Told of the loading.
        Raises:
            Mismatch: If the plan was made for another model.
        """
        progress("loading the model", 0, 1)
        loaded = load_model(self.source, dtype=plan.fingerprint["dtype"], device="cpu")
        found, expected = fingerprint_weights(loaded.model), plan.fingerprint["weights"]
        if found != expected:
            raise Mismatch(
                f"the plan was made for another model than {self.source!r}",
                {"weights": found},
                {"weights": expected},
                "name the plan's model with --model",
            )
        progress("loading the model", 1, 1)
        return loaded
