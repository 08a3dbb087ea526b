"""Before an output appears: what was written is loaded again, and has to compute the loss of the assigned weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from coopq.core.errors import CoopQError, EstimationError, ExportError, ModelError
from coopq.core.types import Losses, Width
from coopq.game.engines.prefix_engine import model_nll
from coopq.model.matrices import matrix_of
from coopq.model.texts import TokenSet, require_known_tokens
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.packed_modules import PackedWeights

PROBE_TOKENS = 64
"""Most tokens of the sequence that a written model is tried on: enough to notice other weights."""
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 2e-2
"""Most mean difference of tokens' losses, relative to their mean. In 16 bits packed layers round otherwise."""
_FORWARD_ERRORS = (RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError)
"""What a model's own code raises if it meets a module that it does not expect."""


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where torch and OpenVINO give the reason; or else the error's kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def probe_tokens(model: Any, calibration: TokenSet | None = None) -> npt.NDArray[np.int64]:
    """A short sequence that models are compared on, shape (1, length).

    Args:
        model: A model of transformers.
        calibration: The calibration tokens, whose first sequence is taken; None takes tokens in the vocabulary's order.
            Special tokens are left out then, since some models expect an image for a token.
    """
    if calibration is not None:
        return calibration.tokens[:1, :PROBE_TOKENS]
    text = model.config.get_text_config()
    special = {
        value for name, value in _entries(model.config.to_dict()) if "token" in str(name) and isinstance(value, int)
    }
    positions = getattr(text, "max_position_embeddings", None) or 2 * PROBE_TOKENS
    length = min(PROBE_TOKENS, positions // 2)  # some models use up positions for padding
    ids = [token for token in range(text.vocab_size) if token not in special][:length]
    return np.array([ids], dtype=np.int64)


def loss_of(model: Any, tokens: npt.NDArray[np.int64], what: str) -> float:
    """Negative log-likelihood of a model on tokens, nats per token, by the model's own forward.

    Args:
        model: A model of transformers, in evaluation mode.
        tokens: Shape (n_sequences, length).
        what: What the model is, for the message.
    Raises:
        ModelError: If the forward fails, with the model's class and the module at fault, or its loss is no number.
    """
    with _named(model, what):
        return float(np.concatenate(list(model_nll(model, tokens))).mean())


@torch.no_grad()
def token_losses(model: Any, tokens: npt.NDArray[np.int64], what: str) -> Losses:
    """Negative log-likelihood of each token but the first of a short sequence, nats, shape (length - 1,).

    Args and errors: as for `loss_of`; tokens have shape (1, length).
    """
    with _named(model, what):
        require_known_tokens(model, tokens)
        ids = torch.from_numpy(tokens).to(model.device)
        losses = _nll(model(input_ids=ids, use_cache=False).logits, ids)
        if not np.isfinite(losses).all():
            raise EstimationError("a loss is not a number")
        return losses


def _nll(logits: Tensor, ids: Tensor) -> Losses:
    losses: Losses = (
        functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none").cpu().double().numpy()
    )
    return losses


@contextmanager
def _named(model: Any, what: str) -> Iterator[None]:
    """Turn what a model's forward raises into an error that names the model and the module at fault."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except EstimationError as error:
        raise ModelError(f"{what} ({type(model).__name__}) gives no finite loss; choose another --backend") from error
    except _FORWARD_ERRORS as error:
        raise ModelError(
            f"{what}: the forward of {type(model).__name__} fails in {_failing_module(model, error.__traceback__)} "
            f"({type(error).__name__}: {last_line(error)}); choose another --backend, and report the model's class"
        ) from error


@contextmanager
def assigned_weights(
    model: Any, packed: PackedWeights, widths: Mapping[str, Width], *, restore: bool
) -> Iterator[None]:
    """Let a model have the weights that packed tensors stand for, inside the `with` block.

    Args:
        model: The model in full precision.
        packed: The packed weights.
        widths: Width of each module.
        restore: Whether the model gets its own weights back; otherwise they are freed.
    """
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, parts in packed.items():
            matrix = matrix_of(model, name)
            own = matrix.parameter.data
            weight = packed.backend.dequantize(parts, matrix.shape, widths[name], own.dtype)
            if restore:  # an accelerator has no room for two models
                before.append((matrix.parameter, own if own.device.type == "cpu" else own.cpu()))
            matrix.parameter.data = matrix.stored(weight).to(own.device)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data.to(parameter.device)


@contextmanager
def measured_weights(bank: WeightBank, assignment: Sequence[Width]) -> Iterator[None]:
    """Let a bank's model have the weights that were measured inside the `with` block; see `assigned_weights`."""
    try:
        with bank.assigned(assignment):
            yield
    finally:
        bank.restore()


def require_equal(found: Losses, expected: Losses, dtype: torch.dtype, what: str, error: type[CoopQError]) -> None:
    """Check that a written model has the losses of the weights that it was made from, token by token.

    Args:
        found: Losses of the written model, nats, shape (n,).
        expected: Losses of the model with the assigned weights on the same tokens.
        dtype: What both computed in.
        what: What was written, for the message.
        error: The class of the error.
    """
    difference = float(np.abs(found - expected).mean())
    if not difference <= _TOLERANCE.get(dtype, _TOLERANCE_16_BITS) * float(expected.mean()) + 1e-5:
        raise error(
            f"{what} computes other losses ({found.mean():.5f} nats per token) than the weights that were chosen "
            f"({expected.mean():.5f}; {difference:.5f} apart from token to token), so nothing is written; choose "
            "another --backend, and report the model's class"
        )


def graph_losses(model_file: Any, tokens: npt.NDArray[np.int64]) -> Losses:
    """Losses of an OpenVINO model as `token_losses` has them, computed in float32 on the CPU.

    Args:
        model_file: Path of the model's .xml file.
        tokens: Shape (1, length).
    Raises:
        ExportError: If OpenVINO cannot run the model.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    n_sequences, length = tokens.shape
    values = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(length)[None].repeat(n_sequences, 0),
        "beam_idx": np.arange(n_sequences, dtype=np.int32),
    }
    try:
        compiled = openvino.Core().compile_model(model_file, "CPU", settings)
        names = [next((name for name in port.get_names() if name in values), None) for port in compiled.inputs]
        if None in names and len(names) > 1:
            raise ValueError(f"unknown inputs {[port.any_name for port in compiled.inputs]}")
        logits = compiled([values[name or "input_ids"] for name in names])[0]
    except (RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            f"OpenVINO cannot run the exported model ({last_line(error)}); name another --base"
        ) from error
    return _nll(torch.from_numpy(logits), torch.from_numpy(tokens))


def _failing_module(model: Any, traceback: TracebackType | None) -> str:
    """Name and class of the innermost module whose code was running when an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = type(model).__name__
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if id(module) in names:
            found = f"{names[id(module)] or 'the model'} ({type(module).__name__})"
        traceback = traceback.tb_next
    return found


def _entries(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries of nested settings; those of lists have the name of the list."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        elif isinstance(value, list):
            yield from ((name, item) for item in value)
        else:
            yield name, value
