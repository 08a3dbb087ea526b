"""The report page: what it says is what was saved, and it loads nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coopq.game.journal import Journal
from coopq.judge.results import Comparison, Evaluation, JudgedPlan
from coopq.plan.plan import Plan, PlayerPlan
from coopq.report.page.document import Section, paragraph, render, save_page, table
from coopq.report.page.provenance import command as command_of
from coopq.report.page.run.figures import size_figure
from coopq.report.page.run.names import name_players
from coopq.report.page.run.page import run_sections, save_run_page
from coopq.report.page.run.record import plan_space, read_run
from coopq.report.tables import plan_summary
from coopq.report.words import megabytes
from coopq.search.measured import Measured
from coopq.search.surrogate import fidelity_of
from tests.command_line import FAST, command, refused
from tests.conftest import STORIES
from tests.pages import checked, large_record, page_of


def test_the_record_is_what_the_search_saw(searched: Path) -> None:
    plan = Plan.load(searched / "plan.json")
    record = read_run(plan, searched.with_name("out-run"))
    chosen = np.flatnonzero((record.measured.assignments == plan.assignment).all(axis=1))
    assert record.measured.n_bytes[chosen].tolist() == [plan.bytes]
    assert record.measured.losses[chosen] == pytest.approx([plan.measured_loss])
    fits = record.searched.n_bytes <= plan.budget_bytes
    assert record.searched.losses[fits].min() == pytest.approx(plan.measured_loss)
    assert plan.fidelity is not None
    assert record.predicted is not None
    assert np.isfinite(record.predicted).sum() == plan.fidelity.n_points
    space = plan_space(plan)
    measured = Measured(space)
    measured.add(record.searched.assignments, record.searched.losses)
    fill = space.capacities[0] / space.step_bytes.sum()
    again = fidelity_of("log", record.predicted, record.searched.losses, measured.fill(), fill)
    assert again.error == pytest.approx(plan.fidelity.error, rel=1e-3)
    assert record.scoring + record.searched.forwards[-1] == pytest.approx(plan.block_forwards / 5)
    assert record.pairs is not None
    assert record.pairs.values.shape == (20, 20)


def test_later_losses_are_no_part_of_the_search(searched: Path, tmp_path: Path) -> None:
    plan = Plan.load(searched / "plan.json")
    run = Path(shutil.copytree(searched.with_name("out-run"), tmp_path / "run"))
    before = read_run(plan, run)
    header = json.loads((run / "journal.jsonl").read_text().splitlines()[0])
    with Journal(run / "journal.jsonl", header["fingerprint"]) as journal:
        journal.append(np.full(20, 2, dtype=np.float32), np.array([9.0, 9.0]), 5)
        journal.append(np.full(20, 16, dtype=np.float32), np.array([0.0, 0.0]), 5)
    after = read_run(plan, run)
    assert len(after.measured.losses) == len(before.measured.losses) + 2
    assert after.measured.n_bytes[-1] == 2 * after.n_weights
    np.testing.assert_array_equal(after.searched.losses, before.searched.losses)
    save_run_page(plan, run, "out", tmp_path / "x.html")
    assert "2 bits for every layer" in (tmp_path / "x.html").read_text(), "a uniform width is measured now"


def test_the_journal_of_another_model_is_left_out(searched: Path) -> None:
    plan = Plan.load(searched / "plan.json")
    other = plan.replace(fingerprint={**plan.fingerprint, "weights": "other"})
    record = read_run(other, searched.with_name("out-run"))
    assert len(record.measured.losses) == 0
    assert record.predicted is None


def test_a_page_says_what_the_plan_says(searched: Path) -> None:
    page = checked(page_of(searched))
    plan = Plan.load(searched / "plan.json")
    assert set(page.specs) == {"size", "widths", "sensitivity", "predicted", "pairs", "search"}
    cells = page.specs["widths"]["data"]["values"]
    assert [float(cell["width"]) for cell in cells] == plan.assignment
    assert [cell["layer"] for cell in cells][:2] == ["block 0, q+k+v", "block 0, o"]
    assert f"{plan.measured_loss:.4g}" in page.text
    assert str(plan.fingerprint["weights"]) in page.text
    assert "--loss kl --budget 3.2bpw --method active --forwards 20 --out out" in page.text


def test_a_surrogate_of_one_point_has_no_left_out_error(searched: Path, tmp_path: Path) -> None:
    plan = Plan.load(searched / "plan.json")
    assert plan.fidelity is not None
    alone = plan.replace(fidelity=replace(plan.fidelity, n_points=1, error=0.0, rank_correlation=None))
    for one, says in ((plan, True), (alone, False)):
        assert ("left-out error" in plan_summary(one)) == says
        assert ("misses left-out losses" in checked(save_run_page(one, None, "out", tmp_path / "x.html")).text) == says


def test_each_size_of_a_run_folder_has_its_page(searched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(searched.with_name("out-run"), tmp_path / "out-run"))
    first = page_of(run.with_name("out"))
    written = first.read_bytes()
    arguments = [
        "quantize",
        str(STORIES),
        "--bits",
        "2,3,4,8",
        "--granularity",
        "fused",
        "--loss",
        "kl",
        "--tokens",
        "128",
    ]
    goal = ["--sequence-length", "64", "--budget", "4bpw", "--minutes", "0", "--run", str(run), "--json"]
    code, text, err = command(*arguments, *goal, "--out", tmp_path / "larger")
    assert code == 0, err
    second = Path(json.loads(text)["report"])
    assert second != first
    assert first.read_bytes() == written
    pages = json.loads(command("show", run, "--page", "--json")[1])["pages"]
    assert sorted(pages) == sorted([str(first), str(second)])


def test_what_evaluate_finds_stands_on_the_page(searched: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(searched, tmp_path / "out"))
    shutil.copytree(searched.with_name("out-run"), tmp_path / "out-run")
    assert "unseen text" not in checked(page_of(out)).text
    for tokens in ("512", "512", "1024"):
        code, text, err = command("evaluate", out, "--tokens", tokens, "--sequence-length", "128", "--json")
        assert code == 0, err
    data = json.loads(text)
    assert data["report"] == str(page_of(out))
    page = checked(Path(data["report"])).text
    assert page.count("tokens scored") == 2, "one text is judged twice, and stands there once"
    assert f"perplexity {data['perplexity']:.3f}" in page
    assert "uniform 2" in page
    for row in data["comparison"]:
        assert f"{row['perplexity']:,.2f}" in page, row["method"]
    other = read_run(Plan.load(out / "plan.json").replace(fingerprint={"weights": "other"}), tmp_path / "out-run")
    assert not other.judged, "what was judged of other weights"
    (tmp_path / "out-run" / "judged.json").write_text("[1]")
    assert "delete it, and run coopq evaluate" in refused("show", out, "--page")


def test_a_mix_is_a_point_at_the_size_of_its_file(searched: Path) -> None:
    run = searched.with_name("out-run")
    record = read_run(Plan.load(searched / "plan.json"), run)
    plan = record.plan
    mix = Comparison("llama.cpp mix", "Q3_K_S", 1, 3.0, 3.4, "kl", 0.25, 3.0, 20.0, (3.0,), file_bytes=plan.file_bytes)
    found = Evaluation(nll=3.0, tokens=9, file_bytes=1, bytes=1, text="a text")
    judged = replace(record, judged=[JudgedPlan(plan.fingerprint, plan.assignment, found, [mix])])
    drawn = json.dumps(size_figure(judged))
    point = {"size": round(plan.bits_per_weight, 4), "loss": 0.25, "label": "mix Q3_K_S"}
    assert json.dumps(point)[1:-1] in drawn
    assert "mix" not in json.dumps(size_figure(record))


def test_the_paper_s_method_shows_its_covariance(finished: Path) -> None:
    page = checked(page_of(finished))
    assert set(page.specs) >= {"widths", "sensitivity", "pairs"}
    assert "covariance of the walks" in page.text


def test_specifications_are_valid(searched: Path, finished: Path, large: Path, comparison: Path) -> None:
    altair = pytest.importorskip("altair", reason="altair carries the schema of Vega-Lite")
    reports = [page_of(searched), page_of(finished)]
    for path in (*reports, large, comparison):
        for spec in checked(path).specs.values():
            altair.Chart.from_dict(spec)


def test_show_writes_the_page_of_whatever_a_path_holds(searched: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(searched, tmp_path / "out"))
    run = Path(shutil.copytree(searched.with_name("out-run"), tmp_path / "out-run"))
    page_of(out).unlink()
    (plan,) = run.glob("plans/*.json")
    for path in (out, run, plan, out / "plan.json"):
        code, text, err = command("show", path, "--page", "--json")
        assert code == 0, err
        assert json.loads(text)["pages"] == [str(page_of(out))]
        shown = checked(page_of(out)).text
        assert "coopq.load(&#x27;out&#x27;)" in shown, path
        assert megabytes(Plan.load(out / "plan.json").file_bytes) in shown, "the file's own size"
    moved = out.rename(tmp_path / "elsewhere")
    command("show", plan, "--page")
    page = page_of(out).read_text()
    assert "coopq.load(" not in page
    assert f"coopq apply out-run/plans/{plan.name} --out OUT" in page
    moved.rename(out)
    shutil.rmtree(run)
    assert json.loads(command("show", out, "--page", "--json")[1])["pages"] == [str(tmp_path / "out-report.html")]
    assert set(checked(tmp_path / "out-report.html").specs) == {"widths", "sensitivity"}
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in searched.iterdir())


def test_an_estimation_without_plans_has_a_front_and_no_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, err = command("estimate", STORIES, "--run", run, *FAST, "--bits", "2,4", "--granularity", "block")
    assert code == 0, err
    code, _, err = command("front", run)
    assert code == 0, err
    assert not list(run.glob("*.html"))
    code, _, err = command("allocate", run, "--budget", "3avg")
    assert code == 0, err
    code, text, err = command("show", run, "--page", "--json")
    assert code == 0, err
    page = Path(json.loads(text)["pages"][0]).read_text()
    assert "coopq apply run/plans/" in page
    assert "The loss of this plan is not measured" in page
    assert "there is no runner-up" not in page
    assert "Shapley value: rise of the loss by lowering the layer" in page


def test_what_has_no_page_is_one_line(tmp_path: Path, searched: Path) -> None:
    assert "is not a run folder" in refused("show", tmp_path, "--page")
    run = Path(shutil.copytree(searched.with_name("out-run"), tmp_path / "run"))
    shutil.rmtree(run / "plans")
    assert "holds no plan yet" in refused("show", run, "--page")
    (run / "comparison.json").write_text('{"request": {}, "held_out": {}, "comparison": []}')
    assert "run coopq compare again" in refused("show", run, "--page")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert "holds no result of a bench" in refused("show", tmp_path / "bench", "--page")


def test_names_of_others_are_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    path = save_page(tmp_path / "x.html", evil, evil, [Section(evil, [paragraph(evil), table([evil], [[evil]])])])
    assert evil not in path.read_text()
    record = large_record(evil)
    save_page(path, "x", "y", run_sections(record, "out"))
    assert evil not in path.read_text()
    assert checked(path).specs["widths"]["data"]["values"][0]["projection"].startswith("</script>")


def test_players_have_names_for_people() -> None:
    def player(name: str, modules: tuple[str, ...], block: int) -> PlayerPlan:
        return PlayerPlan(name, 4, modules, 0.0, None, block, 1, {"4": 1})

    up = "model.layers.1.mlp.up_proj"
    gates = ("model.layers.1.mlp.experts.gate", "model.layers.1.mlp.shared.gate")
    players = [
        player("model.embed_tokens", ("model.embed_tokens",), 0),
        player("model.layers.0", ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"), 0),
        player(f"{up}+gate_proj", (up, "model.layers.1.mlp.gate_proj"), 1),
        *(player(gate, (gate,), 1) for gate in gates),
        player("lm_head", ("lm_head",), 1),
    ]
    assert list(map(str, name_players(players))) == [
        "embedding",
        "block 0",
        "block 1, up+gate",
        "block 1, mlp.experts.gate",
        "block 1, mlp.shared.gate",
        "head",
    ]


def test_the_command_repeats_the_request(searched: Path) -> None:
    plan = Plan.load(searched / "plan.json")
    asked = plan.request.replace(model="a b", symmetric=False, embeddings=True, calibration_seed=3)
    text = command_of(plan.replace(request=asked, method="coopq", alpha=0.3, stopped_after=None), "out")
    assert text == (
        "coopq quantize 'a b' --backend rtn --asymmetric --bits 2,3,4,8 --granularity fused --embeddings --tokens 128 "
        "--sequence-length 64 --calibration-seed 3 --loss kl --budget 3.2bpw --method coopq --alpha 0.3 --out out"
    )


def test_the_page_of_an_interrupted_search_names_no_limit(searched: Path) -> None:
    record = read_run(Plan.load(searched / "plan.json").replace(stopped_after="12 losses"), None)
    text = "".join(str(part) for section in run_sections(record, "out") for part in section.parts)
    assert "The search was interrupted after 12 losses; the same command goes on." in text
    assert "--losses" not in text
    assert "the search was interrupted after 12 losses; the same command goes on" in plan_summary(record.plan)


def test_a_large_run_is_a_small_page(large: Path) -> None:
    page = checked(large)
    assert len(page.specs["widths"]["data"]["values"]) == 210


def test_a_report_without_a_run_folder_is_shorter(searched: Path, tmp_path: Path) -> None:
    plan = Plan.load(searched / "plan.json")
    page = checked(save_run_page(plan, None, "out", tmp_path / "x.html"))
    assert set(page.specs) == {"widths", "sensitivity"}
    assert render("a", "b", []).startswith("<!DOCTYPE html>")
