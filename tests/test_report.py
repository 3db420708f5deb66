"""scripts/report.py: the paper's figures, which row a run is, means against numpy, and the files written."""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from scripts import report
from util.config import load_config
from util.engine.record import environment, processor
from util.report import tables
from util.report.runs import Run, collect, read_curve, read_run

ROOT = Path(__file__).resolve().parent.parent
PAPER = yaml.safe_load((ROOT / "scripts/paper.yaml").read_text())
TABLE3, TABLE4 = PAPER["table3"]["rows"], PAPER["table4"]["rows"]
ROWS = {key: row for table in tables.ablations(PAPER).values() for key, row in table["rows"].items()}


def config(row: str = "full", **changes: Any) -> dict[str, Any]:
    """A run's config: NTRENet's defaults, a row of paper.yaml's switches, and ``changes`` such as model={'x': True}."""
    values = load_config(ROOT / "configs/pascal/resnet50_fold0_1shot.yaml").model_dump()
    for key, value in tables.switches(ROWS[row]).items():
        section, name = key.split(".")
        values[section][name] = value
    for section, new in changes.items():
        values[section] = values[section] | new
    return values


def results(row: str = "full", fold: int = 0, seed: int = 0, miou: Any = (50.0,), **keys: Any) -> dict[str, Any]:
    """A results.json; FB-IoU is 10 above the mIoU and precision 20."""
    scores = {
        name: {"mean": float(np.mean(miou)) + more, "std": 0.0, "per_seed": [m + more for m in miou]}
        for name, more in (("miou", 0), ("fb_iou", 10), ("precision", 20))
    }
    return {
        **{"dataset": "Toy-5i", "fold": fold, "folds": 4, "shots": 1, "backbone": "resnet50", "episodes": 1000},
        **{"seeds": list(range(len(miou))), "unit": "percent", "train_seed": seed, "config": config(row)},
        **{"list_sha256": "a" * 64, "seconds": 10.0, "peak_memory_mib": 100.0, "dtype": "float32"},
        "environment": {"device": "abacus", "git_revision": "1" * 40, "git_clean": True},
    } | scores | keys  # fmt: skip


def run(*args: Any, modified: str = "2026-01-01T00:00:00+00:00", training: Any = None, **keys: Any) -> Run:
    """What is read of a results.json, beside the run.json of a training where one is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), results(*args, **keys)) / "results.json"
        if training is not None:
            write(Path(folder), training, "run.json")
        return read_run(path).model_copy(update={"file": f"{args}{keys}", "modified": modified})


def frame(*runs: Run) -> pd.DataFrame:
    return tables.frame(runs, PAPER)


def write(folder: Path, values: dict[str, Any], name: str = "results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    report.main()


def row_of(markdown: str, *cells: str) -> list[str]:
    """The cells after ``cells`` in the first row that begins with them."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    return next(line[len(cells) :] for line in lines if line[: len(cells)] == list(cells))


# The paper


def printed(table: str, backbone: str, method: str) -> dict[str, Any]:
    (row,) = [r for r in PAPER[table]["rows"] if (r["backbone"], r["method"]) == (backbone, method)]
    return row


def test_the_papers_tables_are_transcribed() -> None:
    assert len(PAPER["table1"]["rows"]) == 22
    assert len(PAPER["table2"]["rows"]) == 12
    assert printed("table1", "ResNet-50", "NTRENet")["1-shot"] == [65.4, 72.3, 59.4, 59.8, 64.2, 77.0]
    assert printed("table1", "VGG-16", "OSLSM")["5-shot"] == [35.9, 58.1, 42.7, 39.1, 44.0, 61.5]
    assert printed("table1", "ResNet-101", "NTRENet")["5-shot"] == [67.9, 73.2, 60.1, 66.8, 67.0, 78.2]
    assert printed("table1", "ResNet-50", "ReRPI")["1-shot"] == [59.8, 68.3, 62.1, 48.5, 59.7, None]
    assert printed("table1", "ResNet-50", "ReRPI")["reference"] == 1
    assert printed("table2", "ResNet-50", "ASGNet")["5-shot"] == [None, None, None, None, 42.5, 67.0]
    assert printed("table2", "ResNet-101", "MLC")["1-shot"] == [50.2, 37.8, 27.1, 30.4, 36.4, None]
    assert printed("table2", "ResNet-101", "NTRENet")["1-shot"] == [38.3, 40.4, 39.5, 38.1, 39.1, 67.5]
    assert TABLE3["bgem"]["paper"] == [63.2, 71.1, 57.7, 57.4, 62.4, 62.8]
    assert TABLE4["negatives_bg"]["paper"] == [64.4, 68.7, 58.4, 58.6, 62.6]
    full = printed("table1", "ResNet-50", "NTRENet")["1-shot"][:5]
    assert full == TABLE3["full"]["paper"][:5] == TABLE4["full"]["paper"]


def test_the_papers_means_are_those_of_its_folds_but_for_one_row_which_has_a_note() -> None:
    rows = [
        (row["backbone"], row["method"], shots, row[shots])
        for table in ("table1", "table2")
        for row in PAPER[table]["rows"]
        for shots in ("1-shot", "5-shot")
    ]
    rows += [("", key, "", row["paper"]) for table in (TABLE3, TABLE4) for key, row in table.items()]
    wrong = [r[:3] for r in rows if r[3][0] is not None and abs(np.mean(r[3][:4]) - r[3][4]) > 0.1 + 1e-6]
    assert wrong == [("VGG-16", "MMNet", "5-shot")]
    values = printed("table1", "VGG-16", "MMNet")["5-shot"]
    note = (
        f"VGG-16, MMNet, 5-shot: the paper prints the mean {values[4]}; its four folds have {np.mean(values[:4]):.2f}."
    )
    assert PAPER["table1"]["note"] == note


# Which row a run is


def test_every_file_of_configs_ablation_is_a_row_on_any_config() -> None:
    for path in (ROOT / "configs").glob("*/*_fold0_1shot.yaml"):
        for ablation in (None, *(ROOT / "configs/ablation").glob("*.yaml")):
            values = load_config([path, *([ablation] if ablation else [])]).model_dump()
            found = frame(run(dataset=values["data"]["dataset"], config=values))
            assert found.row.tolist() == [ablation.stem if ablation else "full"]


@pytest.mark.parametrize("changes", [{"model": {"x": True}}, {"model": {"channels": 64}}, {"loss": {"gamma": 0.1}}])
def test_a_run_whose_model_or_loss_departs_from_every_row_is_never_counted_as_one(changes: dict[str, Any]) -> None:
    """A fork's switch, another C, another weight of a loss: none takes the place of NTRENet or PFENet."""
    fork = run("full", 0, 0, [90.0], config=config("full", **changes), modified="2027-01-01T00:00:00+00:00")
    found = frame(run("full"), fork, run("pfenet"), run("pfenet", 0, 1, config=config("pfenet", **changes)))
    assert not found.replaced.any()
    own = found[(found.setting == "Toy-5i, ResNet-50, 1-shot") & (found.row == "full")]
    assert tables.score(own, "miou").mean == 50


def test_a_switch_names_a_row_and_a_number_that_no_row_has_names_the_setting() -> None:
    assert frame(run(config=config(model={"x": True}))).row.tolist() == ["model.x=true"]
    assert frame(run("pfenet", config=config("pfenet", model={"x": True}))).row.tolist() == ["pfenet, model.x=true"]
    small = frame(*(run(row, config=config(row, model={"channels": 64})) for row in TABLE3))
    assert small.row.tolist() == list(TABLE3)
    assert set(small.setting) == {"Toy-5i, ResNet-50, 1-shot, model.channels=64"}
    assert frame(run("channels_512")).row.tolist() == ["channels_512"]


def test_a_row_of_ones_own_in_paper_yaml_stands_in_the_table_with_its_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for fold in range(4):
        write(tmp_path / f"a{fold}", results("full", fold, 0, [50.0]))
        write(tmp_path / f"b{fold}", results("full", fold, 0, [53.0], config=config(model={"x": True})))
    command(monkeypatch, tmp_path)
    without = capsys.readouterr().out
    assert row_of(without, "+ PCL (NTRENet)")[4] == "50.0"
    assert row_of(without, "model.x=true")[4] == "53.0"
    lines = (ROOT / "scripts/paper.yaml").read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if "+ PCL" in line)
    lines.insert(place + 1, "    x: {label: + X, model.x: true}")
    (tmp_path / "paper.yaml").write_text("\n".join(lines))
    monkeypatch.setattr(report, "PAPER", tmp_path / "paper.yaml")
    command(monkeypatch, tmp_path)
    assert row_of(capsys.readouterr().out, "+ X")[4:6] == ["53.0", "+3.0"]


def test_a_ladders_row_that_the_paper_does_not_have_is_ours_alone() -> None:
    rows = {key: {k: v for k, v in row.items() if k != "paper" or key != "bgem"} for key, row in TABLE3.items()}
    table = tables.ladder(frame(run("bgem"), run("full")), rows, beside_paper=True).set_index("Network")
    assert table["Fold 0"].tolist() == ["50.0", "50.0 (-15.4)"]


def test_of_two_files_of_a_cell_and_seed_the_newest_counts_not_the_best() -> None:
    old = run("full", 0, 3, [90.0], modified="2026-01-01T00:00:00+00:00")
    new = run("full", 0, 3, [10.0], modified="2026-01-02T00:00:00+00:00")
    found = frame(new, run("full", 0, 4, [50.0]), old)
    assert found[found.replaced].file.tolist() == [old.file]


# Cells


def test_several_training_seeds_give_their_mean_and_sample_deviation_each_averaged_over_evaluation_seeds() -> None:
    values = np.array([[60.0, 62.0, 61.5], [58.0, 57.0, 63.5], [64.0, 61.0, 66.0]])  # training seed, evaluation seed
    got = tables.score(frame(*(run("full", 0, seed, row) for seed, row in enumerate(values))), "precision")
    assert got.over == "training"
    assert got.mean == pytest.approx(values.mean() + 20)
    assert got.std == pytest.approx(values.mean(1).std(ddof=1))


def test_a_single_training_seed_gives_the_deviation_over_evaluation_seeds_and_one_of_each_gives_none() -> None:
    values = [60.0, 62.0, 61.0, 65.0]
    got = tables.score(frame(run("full", 0, 0, values)), "miou")
    assert (got.over, got.std) == ("evaluation", pytest.approx(np.std(values, ddof=1)))
    assert tables.score(frame(run("full", 0, 0, [60.0])), "miou").std is None


def test_the_mean_of_folds_deviates_over_the_training_seeds_that_all_folds_share() -> None:
    values = np.random.default_rng(0).uniform(40, 70, (4, 3, 2))  # fold, training seed, evaluation seed
    cells = [run("full", f, s, values[f, s]) for f in range(4) for s in range(3)]
    got = tables.score(frame(*cells), "miou")
    assert got.mean == pytest.approx(values.mean())
    assert got.std == pytest.approx(values.mean((0, 2)).std(ddof=1))
    ragged = tables.score(frame(*(r for r in cells if (r.fold, r.seed) != (0, 2))), "miou")
    assert ragged.std is None
    assert ragged.mean == pytest.approx(np.mean([values[0, :2].mean(), *values[1:].mean((1, 2))]))


def line_of(*runs: Run, **keys: Any) -> dict[str, str]:
    (line,) = tables.ladder(frame(*runs), TABLE3, **keys).to_dict("records")
    return line


def test_without_all_folds_there_is_no_mean() -> None:
    three = [run("full", fold, 0, [50.0 + fold]) for fold in (0, 1, 3)]
    line = line_of(*three)
    assert [line[f"Fold {f}"] for f in range(4)] == ["50.0", "51.0", "not run", "53.0"]
    assert line["Mean"] == "-"
    line = line_of(*three, run("full", 2, 0, [52.0]))
    assert (line["Fold 2"], line["Mean"], line["FB-IoU"], line["Precision"]) == ("52.0", "51.5", "61.5", "71.5")


def test_a_cell_shows_the_deviations_kind_a_random_backbone_and_the_difference_to_the_paper() -> None:
    assert line_of(run("full", 0, 0, [65.0, 67.0]), beside_paper=True)["Fold 0"] == "66.0 ± 1.4† (+0.6)"
    assert line_of(*(run("full", 0, seed, [50.0 + 2 * seed]) for seed in (0, 1)))["Fold 0"] == "51.0 ± 1.4"
    assert line_of(run(config=config(model={"weights": "random"})))["Fold 0"] == "50.0‡"


def test_the_threshold_of_base_classes_and_the_best_one_stand_where_they_are_known() -> None:
    trained = {"finished": {"steps": 1, "seconds": 1.0, "peak_memory_mib": 1.0}}
    found = {"threshold": 0.3, "miou": {"per_seed": [58.0]}}
    lower = run("full", 0, calibrated=found, training=trained).model_copy(update={"best": [59.0]})
    at_half = run("full", 1, training=trained)  # test.py does not repeat what is at 0.5
    line = line_of(lower, at_half)
    assert (line["mIoU, base threshold"], line["mIoU, best threshold"]) == ("54.0", "59.0")
    assert "mIoU, base threshold" not in line_of(at_half)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"list_sha256": "b" * 64}, "evaluation lists"),
        ({"environment": {"git_revision": "2" * 40, "git_clean": True}}, "code revisions"),
        ({"environment": {"git_revision": "1" * 40, "git_clean": False}}, "code revisions"),
        ({"episodes": 200}, "numbers of episodes"),
        ({"config": config("full", eval={"geometry": "exact"})}, "settings eval.geometry"),
        ({"config": config("full", train={"lr": 0.01})}, "settings train.lr"),
    ],
)
def test_runs_of_one_table_that_do_not_compare_are_warned_of(keys: dict[str, Any], what: str) -> None:
    assert list(tables.differences(frame(run("full", 0), run("full", 1, **keys)))) == [what]
    assert tables.differences(frame(run("full", 0), run("bgem", 1))) == {}


# The order


def follows(means: list[float], rows: dict[str, Any], folds: range = range(4)) -> bool | None:
    runs = [run(row, fold, 0, [mean + fold]) for row, mean in zip(rows, means, strict=False) for fold in folds]
    return tables.follows(frame(*runs), rows)


def test_the_order_holds_only_where_every_step_rises() -> None:
    assert follows([50.0, 54.0, 54.5, 55.0], TABLE3) is True
    assert follows([50.0, 54.0, 54.0, 55.0], TABLE3) is False
    assert follows([50.0, 55.0, 54.0, 56.0], TABLE3) is False
    assert follows([50.0, 51.0, 52.0], TABLE4) is True


def test_without_all_rows_on_all_folds_no_statement_is_made() -> None:
    assert follows([50.0, 54.0, 54.5, 55.0], TABLE3, range(1)) is None
    assert follows([50.0, 54.0, 54.5], TABLE3) is None


def test_a_record_names_the_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 9000\n")
    assert processor(tmp_path / "cpuinfo") == "Abacus 9000"
    assert processor(tmp_path / "missing") != ""
    assert processor() in environment(torch.device("cpu"))["device"]


# The command


class Page(HTMLParser):
    """Which elements are open, and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            assert values["alt"]
            self.images.append(base64.b64decode((values["src"] or "").removeprefix("data:image/png;base64,")))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img", "br"):
            assert self.open.pop() == tag


STEPS = 300
STARTS = [{"time": "2026-01-01T00:00:00+00:00", "step": 0}, {"time": "2026-01-02T03:04:05+00:00", "step": 14}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the paper's own setting and of another data set, with events, doubles, damage and a failed run."""
    root = tmp_path_factory.mktemp("runs")
    pascal = {"dataset": "PASCAL-5i"}
    finished = {"steps": STEPS, "seconds": 7200.0, "peak_memory_mib": 2048.0}
    training = {"device": "abacus", "git_revision": "1" * 40, "finished": finished, "starts": STARTS}
    for i, row in enumerate(["pfenet", "bgem", "bgem_doem", "full", "channels_512", "per_scale"]):
        for fold in range(4):
            folder = write(root / f"{row}_{fold}", results(row, fold, 0, [50.0 + i, 52.0 + i], **pascal))
            write(folder, training, "run.json")
    with SummaryWriter(root / "full_0/tensorboard") as events:
        for step in range(1, STEPS + 1):
            events.add_scalar("loss/total", 1 / step, step)
        for step in (100, 200, 300):
            events.add_scalar("val/miou", step / 1000, step)
    figures = {"miou": {"0.5": 54.0, "0.4": 58.0}}
    write(root / "full_0", {"checkpoint": "best.pt", "novel": figures, "base": figures}, "diagnosis.json")
    old = write(root / "old", results("full", 0, 0, [99.0, 99.0], **pascal)) / "results.json"
    os.utime(old, (1, 1))
    write(root / "toy", results("bgem", 2, 0, [40.0]))
    (root / "toy/results_damaged.json").write_text('{"dataset": "Toy')
    write(root / "toy", {"something": "else"}, "results_foreign.json")
    write(root / "toy", results("full", 1, 0, [float("nan")]), "results_nan.json")
    write(root / "crashed", {"device": "abacus"}, "run.json")
    return root


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of their report, and how the command ended."""
    out = tmp_path_factory.mktemp("report")
    words = [sys.executable, "scripts/report.py", runs, "--out", out, "--lines", out / "lines.jsonl"]
    return out, subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_results_of_baselines_alone_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"dataset": "D", "baselines": {"training_free": {"miou": 30.0}}}))
    (skipped,) = collect([tmp_path]).skipped
    assert "it holds only what needs no training" in skipped


def test_the_command_says_what_it_found_and_what_it_skipped(
    written: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = written
    assert done.returncode == 0, done.stderr
    assert f"{out}/report.md, {out}/report.html" in done.stdout
    assert "25 counted, 1 replaced by newer ones, 1 without results, skipped files 3" in done.stdout
    problems = done.stderr.splitlines()
    assert len(problems) == 3
    for name in ("damaged", "foreign", "nan"):
        assert sum(line.startswith("warning: skipped") and f"results_{name}.json" in line for line in problems) == 1


def test_the_report_shows_our_runs_first_and_hides_no_failure(
    runs: Path, written: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    text = (written[0] / "report.md").read_text()
    for path in runs.rglob("results*.json"):
        assert str(path) in text
    assert f"- {runs}/crashed: unfinished" in text
    (line,) = [line for line in text.splitlines() if f"| {runs}/bgem_2/results.json" in line]
    assert "resumed at step 14, 2026-01-02T03:04:05+00:00" in line
    (line,) = [line for line in text.splitlines() if f"| {runs}/old/results.json" in line]
    assert "replaced by a newer file" in line
    assert row_of(text, "+ PCL (NTRENet)")[0] == "54.0 ± 1.4† (-11.4)"  # not 99.0
    assert row_of(text, "+ BGEM")[4:7] == ["52.0 ± 1.4† (-10.4)", "+1.0", "72.0 ± 1.4† (+9.2)"]
    assert row_of(text, "ResNet-50", "PFENet, ours")[4] == "51.0 ± 1.4† (-9.8)"
    assert "mIoU, best threshold" in text
    assert row_of(text, "512")[4] == "55.0 ± 1.4†"
    assert row_of(text, "at each scale of FEM")[4] == "56.0 ± 1.4†"
    toy, toys_costs = text.split("## Toy-5i")[1:]
    assert row_of(toy, "+ BGEM")[:7] == ["not run", "not run", "40.0", "not run", "-", "", "60.0"]
    assert row_of(text, "full", "abacus", "float32") == ["4", "2.00", "2048", "5.0", "100"]
    assert row_of(toys_costs, "bgem", "abacus", "float32") == ["1", "-", "-", "10.0", "100"]
    assert text.count("The paper's order holds here.") == 1
    own, folded = text.index("| + PCL (NTRENet)"), text.index("of which nothing was run")
    assert own < text.index("## Table 1, 1-shot") < folded < text.index("## Table 1, 5-shot")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) > 8
    assert all(len({line.count("|") for line in lines}) == 1 for lines in blocks)


def test_the_html_is_one_well_formed_file_with_the_pictures_inside(
    written: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    text, markdown = (written[0] / "report.html").read_text(), (written[0] / "report.md").read_text()
    page = Page(text)
    assert page.open == []
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert sorted(pictures) == sorted(path.name for path in written[0].glob("*.png"))
    assert page.images == [(written[0] / name).read_bytes() for name in pictures]
    assert len(pictures) == 1
    assert text.count("<table>") == sum(block.startswith("|") for block in markdown.split("\n\n"))


def test_curves_hold_every_loss_that_was_logged(runs: Path) -> None:
    curve = read_curve(str(runs / "full_0/results.json"))
    np.testing.assert_allclose(curve["loss/total"], 1 / np.arange(1, STEPS + 1), rtol=1e-6)
    assert curve["val/miou"].dropna().index.tolist() == [100, 200, 300]


def test_a_file_of_lines_gives_the_same_tables_as_its_runs_and_names_no_path_of_the_data(
    runs: Path,
    written: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = written[0] / "lines.jsonl"
    command(monkeypatch, lines, "--lines", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == lines.read_bytes()
    from_lines = capsys.readouterr().out.split("\n", 1)[1]
    command(monkeypatch, runs)
    assert capsys.readouterr().out == from_lines
    assert "VOCdevkit" not in lines.read_text()
    assert lines.stat().st_size < 3000 * 26


def test_the_same_runs_give_the_same_files(
    runs: Path,
    written: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command(monkeypatch, runs, "--out", tmp_path, "--lines", tmp_path / "lines.jsonl")
    names = sorted(path.name for path in written[0].iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((written[0] / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_a_folder_without_results_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "runs/started", {"device": "abacus"}, "run.json")
    with pytest.raises(report.UserError, match=r"1 runs there have none yet.*run 'python test.py --config"):
        command(monkeypatch, tmp_path / "runs", "--out", tmp_path / "out")
    with pytest.raises(report.UserError, match="is not a folder"):
        command(monkeypatch, tmp_path / "elsewhere", "--out", tmp_path / "out")
