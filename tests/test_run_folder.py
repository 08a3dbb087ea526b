"""A run that is refused leaves nothing behind but what took work, and touches nothing that was there before."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from coopq.core.errors import EstimationError, ModelError, RunError
from coopq.core.files import locked
from coopq.core.specs import Request
from coopq.game.prepared import prepare
from coopq.game.run_folder import RunFolder
from coopq.game.session import Session, open_session
from tests.command_line import refused
from tests.conftest import STORIES

REQUEST = Request.from_options(model=str(STORIES), tokens=128, sequence_length=64)


def test_a_folder_that_another_process_takes_first_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is new for both, and the other one is faster to lock it."""
    run = tmp_path / "run"
    with ExitStack() as other:

        def overtaken(folder: Path) -> None:
            folder.mkdir()
            other.enter_context(locked(folder))

        monkeypatch.setattr("coopq.game.run_folder.require_writable", overtaken)
        with pytest.raises(RunError, match="in use"), RunFolder(run).opened(REQUEST):
            pass
        assert [file.name for file in run.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("made", ["scores/gradient.json", "plans/active.json", "evaluation/judging.jsonl"])
def test_results_stay_though_the_weights_are_elsewhere(made: str, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def work() -> None:
        with open_session(prepare(REQUEST), run, bank=tmp_path / "bank"):
            (run / made).parent.mkdir()
            (run / made).write_text("header\nresult\n")
            raise EstimationError("too late")

    with pytest.raises(EstimationError):
        work()
    assert (run / made).exists()
    assert RunFolder(run).request() == REQUEST
    assert any((tmp_path / "bank").glob("*.safetensors"))


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError), RunFolder(tmp_path / "run").opened(REQUEST):
        raise ModelError("refused")
    assert (tmp_path / "run").is_dir()


def test_a_refusal_before_the_weights_leaves_nothing_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(session: Session) -> None:
        raise ModelError(f"{session.folder.path} has a journal and a bank by now")

    monkeypatch.setattr(Session, "check_blocks", refuse)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.jsonl").write_text("{}\n")
    for name in ("run", "theirs"):
        with pytest.raises(ModelError), open_session(prepare(REQUEST), tmp_path / name):
            pass
    assert not (tmp_path / "run").exists()
    assert {file.name for file in (tmp_path / "theirs").iterdir()} <= {"notes.jsonl", "run.lock", "bank"}


def test_weights_stay_for_the_corrected_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(EstimationError), open_session(prepare(REQUEST), run):
        raise EstimationError("nothing is measured yet")
    kept = sorted(file.relative_to(run) for file in run.rglob("*.*") if file.name != "run.lock")
    assert Path("bank/bank.json") in kept
    assert {file.parent.name for file in kept} == {"bank"}
    with open_session(prepare(REQUEST.replace(tokens=64)), run):
        assert RunFolder(run).request().text.tokens == 64


def test_a_folder_that_is_no_run_folder_names_the_commands_that_make_one(tmp_path: Path) -> None:
    line = refused("show", tmp_path)
    assert "`coopq quantize` or `coopq estimate` makes one" in line
