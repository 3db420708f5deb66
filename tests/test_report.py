"""scripts/report.py: the paper's figures, means against numpy, what is missing, and the files written."""

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from scripts import report
from util.config import load_config
from util.engine.record import environment, processor
from util.report import tables
from util.report.tables import (
    LADDER,
    NEGATIVES,
    Line,
    Results,
    Run,
    RunConfig,
    Setting,
    Table,
    differences,
    disagreement,
    group_runs,
    make_table,
    newest,
    order,
    score,
    variant_of,
    warnings,
)

ROOT = Path(__file__).resolve().parent.parent
PAPER = yaml.safe_load((ROOT / "scripts/paper.yaml").read_text())
SWITCHES = {
    "pfenet": (False, False, False, "do", 640, "single"),
    "bgem": (True, False, False, "do", 640, "single"),
    "bgem_doem": (True, True, False, "do", 640, "single"),
    "full": (True, True, True, "do", 640, "single"),
    "negatives_bg": (True, True, True, "bg", 640, "single"),
    "negatives_non_target": (True, True, True, "non_target", 640, "single"),
    "channels_512": (True, True, True, "do", 512, "single"),
    "per_scale": (True, True, True, "do", 640, "per_scale"),
}
SETTING = Setting("Toy-5i", "resnet50", 1)


def config(variant: str = "full", **keys: Any) -> dict[str, Any]:
    bgem, doem, pcl, negatives, channels, elimination = SWITCHES[variant]
    model = {"weights": "imagenet", "bgem": bgem, "doem": doem, "prototype_channels": channels}
    model |= {"do_average": "image", "fem_prior": True, "do_similarity": True}
    return {
        "data": {"train_list": "train.txt", "shots": 1},
        "model": model | {"elimination": elimination} | keys.get("model", {}),
        "loss": {"pcl": pcl, "pcl_negatives": negatives},
        "train": {"lr": keys.get("lr", 0.03)},
        "eval": {"geometry": keys.get("geometry", "exact")},
        "seed": 0,
    }


def results(variant: str = "full", fold: int = 0, seed: int = 0, miou: Any = (50.0,), **keys: Any) -> dict[str, Any]:
    """A results.json; FB-IoU is 10 above the mIoU and precision 20."""
    scores = {
        name: {"mean": float(np.mean(miou)) + more, "std": 0.0, "per_seed": [m + more for m in miou]}
        for name, more in (("miou", 0), ("fb_iou", 10), ("precision", 20))
    }
    return {
        "dataset": "Toy-5i",
        "fold": fold,
        "folds": 4,
        "shots": 1,
        "backbone": "resnet50",
        "episodes": 1000,
        "seeds": list(range(len(miou))),
        "unit": "percent",
        **scores,
        "train_seed": seed,
        "config": config(variant),
        "list_sha256": "a" * 64,
        "seconds": 10.0,
        "peak_memory_mib": 100.0,
        "dtype": "float32",
        "environment": {"device": "abacus", "git_revision": "1" * 40, "git_clean": True},
    } | keys


def run(*args: Any, modified: float = 0.0, **keys: Any) -> Run:
    return Run(f"{args}{keys}", modified, Results.model_validate(results(*args, **keys)))


def write(folder: Path, values: dict[str, Any], name: str = "results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path) -> str:
    """Run the command in this process; the Markdown it writes."""
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder), "--out", str(out)])
    report.main()
    return (out / "report.md").read_text()


def row_of(markdown: str, *cells: str) -> list[str]:
    """The cells after ``cells`` in the first row that begins with them."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {' | '.join(cells)} |"))
    return [cell.strip() for cell in line.split("|")[1 + len(cells) : -1]]


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
    assert printed("table1", "ResNet-50", "ReRPI") == {
        "backbone": "ResNet-50",
        "method": "ReRPI",
        "reference": 1,
        "1-shot": [59.8, 68.3, 62.1, 48.5, 59.7, None],
        "5-shot": [64.6, 71.4, 71.1, 59.3, 66.6, None],
    }
    assert printed("table2", "ResNet-50", "ASGNet")["5-shot"] == [None, None, None, None, 42.5, 67.0]
    assert printed("table2", "ResNet-101", "MLC")["1-shot"] == [50.2, 37.8, 27.1, 30.4, 36.4, None]
    assert printed("table2", "ResNet-101", "NTRENet")["1-shot"] == [38.3, 40.4, 39.5, 38.1, 39.1, 67.5]
    assert PAPER["table3"]["rows"]["bgem"] == [63.2, 71.1, 57.7, 57.4, 62.4, 62.8]
    assert PAPER["table4"]["rows"]["negatives_bg"] == [64.4, 68.7, 58.4, 58.6, 62.6]


def test_the_full_network_is_the_same_in_all_of_the_papers_tables() -> None:
    full = printed("table1", "ResNet-50", "NTRENet")["1-shot"][:5]
    assert full == PAPER["table3"]["rows"]["full"][:5] == PAPER["table4"]["rows"]["full"]


def test_the_papers_means_are_those_of_its_folds_but_for_one_row_which_gets_a_note() -> None:
    rows = [
        (row["backbone"], row["method"], shots, row[shots])
        for table in ("table1", "table2")
        for row in PAPER[table]["rows"]
        for shots in ("1-shot", "5-shot")
    ]
    rows += [("", v, t, values) for t in ("table3", "table4") for v, values in PAPER[t]["rows"].items()]
    wrong = []
    for backbone, method, shots, values in rows:
        if values[0] is not None and abs(np.mean(values[:4]) - values[4]) > 0.1 + 1e-6:
            wrong.append((backbone, method, shots))
        assert bool(disagreement([backbone, method], values)) == ((backbone, method, shots) in wrong)
    assert wrong == [("VGG-16", "MMNet", "5-shot")]
    (note,) = disagreement(["VGG-16", "MMNet"], printed("table1", "VGG-16", "MMNet")["5-shot"])
    assert "VGG-16, MMNet" in note
    assert "58.3" in note
    assert "60.85" in note


# Cells


@pytest.mark.parametrize("variant", SWITCHES)
def test_a_variant_follows_from_the_config(variant: str) -> None:
    assert variant_of(RunConfig.model_validate(config(variant))) == variant


def test_an_older_config_without_elimination_is_single_and_mixed_departures_are_other() -> None:
    older = config("full")
    del older["model"]["elimination"]
    assert variant_of(RunConfig.model_validate(older)) == "full"
    assert variant_of(RunConfig.model_validate(config("bgem", model={"prototype_channels": 64}))) == "other"
    assert variant_of(RunConfig.model_validate(config("negatives_bg", model={"prototype_channels": 64}))) == "other"


def test_a_run_whose_model_or_loss_departs_from_every_known_variant_is_never_counted_as_one() -> None:
    """A fork's switch, another C, another weight of a loss: none may take the place of NTRENet or PFENet."""
    for variant in ("full", "pfenet"):
        for section, changes in (("model", {"x": True}), ("model", {"channels": 64}), ("loss", {"gamma": 0.1})):
            changed = config(variant)
            changed[section] |= changes
            assert variant_of(RunConfig.model_validate(changed)) == "other"
    unlike = results("full", 0, 0, (90.0,), config=config("full", model={"x": True}))
    runs = [run("full", 0, 0, (50.0,), modified=1), Run("fork", 2, Results.model_validate(unlike))]
    counted, replaced = newest(runs)
    assert not replaced
    assert group_runs(counted)[SETTING, "full"] == {0: runs[:1]}


def test_a_variant_is_a_file_of_configs_ablation_on_any_config() -> None:
    for path in (ROOT / "configs").glob("*/*_fold0_1shot.yaml"):
        for variant in (None, *(ROOT / "configs/ablation").glob("*.yaml")):
            config = load_config([path, *([variant] if variant else [])])
            name = variant_of(RunConfig.model_validate(config.model_dump()))
            assert name == (variant.stem if variant else "full")


def test_a_row_that_the_paper_does_not_have_is_ours_alone() -> None:
    paper = {variant: row for variant, row in PAPER["table3"]["rows"].items() if variant != "bgem_doem"}
    table = tables.ladder("", group_runs([run("bgem_doem")]), SETTING, paper)
    assert [row.cells[3] for row in table.rows if row.cells[:3] == ["✓", "✓", ""]] == ["ours"]


def test_several_training_seeds_give_their_mean_and_sample_deviation_each_averaged_over_evaluation_seeds() -> None:
    values = np.array([[60.0, 62.0, 61.5], [58.0, 57.0, 63.5], [64.0, 61.0, 66.0]])  # training seed, evaluation seed
    got = score([[run("full", 0, seed, row) for seed, row in enumerate(values)]], "precision")
    assert got.over == "training"
    assert got.mean == pytest.approx(values.mean() + 20)
    assert got.std == pytest.approx(values.mean(1).std(ddof=1))


def test_a_single_training_seed_gives_the_deviation_over_evaluation_seeds_and_one_of_each_gives_none() -> None:
    values = [60.0, 62.0, 61.0, 65.0]
    got = score([[run("full", 0, 0, values)]], "miou")
    assert (got.over, got.std) == ("evaluation", pytest.approx(np.std(values, ddof=1)))
    assert score([[run("full", 0, 0, [60.0])]], "miou")[1:3] == (None, None)


def test_the_mean_of_folds_deviates_over_the_training_seeds_that_all_folds_share() -> None:
    values = np.random.default_rng(0).uniform(40, 70, (4, 3, 2))  # fold, training seed, evaluation seed
    cells = [[run("full", f, s, values[f, s]) for s in range(3)] for f in range(4)]
    got = score(cells, "miou")
    assert got.mean == pytest.approx(values.mean())
    assert got.std == pytest.approx(values.mean((0, 2)).std(ddof=1))
    ragged = [cells[0][:2], *cells[1:]]
    assert score(ragged, "miou").std is None
    assert score(ragged, "miou").mean == pytest.approx(np.mean([values[0, :2].mean(), *values[1:].mean((1, 2))]))


def table_of(runs: list[Run], **keys: Any) -> Table:
    group: dict[int, list[Run]] = {}
    for r in runs:
        group.setdefault(r.results.fold, []).append(r)
    return make_table("T", ["Method"], [Line(["ours"], group=group, **keys)], 4, "fb_iou")


def test_without_all_folds_there_is_no_mean() -> None:
    three = [run("full", fold, 0, [50.0 + fold]) for fold in (0, 1, 3)]
    assert table_of(three).rows[0].cells == ["ours", "50.0", "51.0", "not run", "53.0", "-", "-"]
    four = [*three, run("full", 2, 0, [52.0])]
    assert table_of(four).rows[0].cells == ["ours", "50.0", "51.0", "52.0", "53.0", "51.5", "61.5"]
    assert table_of([]).rows[0].cells == ["ours", *["not run"] * 6]


def test_the_difference_to_the_paper_and_the_kind_of_deviation_stand_in_the_cell() -> None:
    table = table_of([run("full", 0, 0, [50.0, 52.0])], reference=[51.3, None, None, None, None, None])
    assert table.rows[0].cells[1] == "51.0 ± 1.4† (-0.3)"
    assert any(note.startswith("†") and "evaluation seeds" in note for note in table.notes)
    table = table_of([run("full", 0, seed, [50.0 + 2 * seed]) for seed in (0, 1)])
    assert table.rows[0].cells[1] == "51.0 ± 1.4"
    assert any("training seeds (2 in a cell)" in note for note in table.notes)


def test_only_the_best_of_ours_in_a_column_is_bold_even_where_the_paper_is_better() -> None:
    lines = [
        Line(["a"], paper=[99.0, 99.0, 99.0, 99.0, 99.0]),
        Line(["b"], group={0: [run("full", 0, 0, [50.0])], 1: [run("full", 1, 0, [70.0])]}),
        Line(["c"], group={0: [run("bgem", 0, 0, [60.0])]}),
    ]
    rows = make_table("T", [""], lines, 4, bold=True).rows
    assert [row.cells[1] for row in rows] == ["99.0", "50.0", "**60.0**"]
    assert rows[1].cells[2] == "70.0"  # alone in its column


def test_of_two_files_of_a_cell_and_seed_the_newest_counts_not_the_best() -> None:
    old, new = run("full", 0, 3, [90.0], modified=1.0), run("full", 0, 3, [10.0], modified=2.0)
    other_seed = run("full", 0, 4, [50.0], modified=0.0)
    counted, replaced = newest([new, other_seed, old])
    assert (counted, replaced) == ([new, other_seed], [old])


def test_rows_of_different_numbers_of_episodes_and_random_backbones_are_marked() -> None:
    few = run("full", 1, 0, [50.0], episodes=200, config=config("full", model={"weights": "random"}))
    table = table_of([run("full", 0, 0, [50.0]), few])
    assert table.rows[0].cells[1:3] == ["50.0", "50.0‡"]
    assert "ours: different numbers of episodes in one row: fold 0 1000, fold 1 200." in table.notes


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"list_sha256": "b" * 64}, "evaluation lists"),
        ({"environment": {"git_revision": "2" * 40, "git_clean": True}}, "code revisions"),
        ({"environment": {"git_revision": "1" * 40, "git_clean": False}}, "dirty tree"),
        ({"config": config("full", geometry="lineage")}, "evaluation geometries"),
        ({"config": config("full", lr=0.01)}, "settings train.lr"),
    ],
)
def test_runs_of_one_table_that_do_not_compare_are_warned_of(keys: dict[str, Any], word: str) -> None:
    table = table_of([run("full", 0), run("full", 1, **keys)])
    (warning,) = warnings([table])
    assert word in warning
    assert "in T" in warning
    assert differences(table.runs[:1]) == {}
    assert differences([run("full", 0), run("bgem", 1, config=config("bgem"))]) == {}


# The order


def ladder(means: list[float], steps: dict[str, Any], folds: range = range(4), gap: float = 1.0) -> str:
    """The sentence on two training seeds a cell, ``gap`` apart."""
    runs = [
        run(variant, fold, seed, [mean + fold + gap * (seed - 0.5)])
        for variant, mean in zip(steps, means, strict=True)
        for fold in folds
        for seed in (0, 1)
    ]
    return order(group_runs(runs), SETTING, {variant: variant for variant in steps}).sentence


def test_the_order_holds_only_where_every_step_rises() -> None:
    up = ladder([50.0, 54.0, 54.5, 55.0], LADDER)
    assert "The paper's order holds on Toy-5i" in up
    assert "bgem 55.5 (+4.0, more than the std over 2 training seeds, 0.7)" in up
    assert "bgem_doem 56.0 (+0.5, not more than the std over 2 training seeds, 0.7)" in up
    assert "The paper's order does not hold" in ladder([50.0, 54.0, 54.0, 55.0], LADDER)
    assert "The paper's order does not hold" in ladder([50.0, 55.0, 54.0, 56.0], LADDER)
    assert "The paper's order holds" in ladder([50.0, 51.0, 52.0], NEGATIVES)
    assert "The paper's order does not hold" in ladder([52.0, 51.0, 53.0], NEGATIVES)


def test_without_all_folds_no_statement_on_the_mean_is_made() -> None:
    sentence = ladder([50.0, 54.0, 54.5, 55.0], LADDER, folds=range(1))
    assert "no mean to compare" in sentence
    assert "on fold 0 alone the paper's order holds" in sentence
    runs = [run(variant) for variant in list(LADDER)[:3]]
    judged = order(group_runs(runs), SETTING, {variant: variant for variant in LADDER})
    assert judged.holds is None
    assert "cannot be judged" in judged.sentence
    assert "no runs of full" in judged.sentence


def test_a_single_run_a_cell_has_no_deviation_to_compare_with() -> None:
    groups = group_runs(run(v, fold, 0, [50.0 + i]) for i, v in enumerate(NEGATIVES) for fold in range(4))
    assert order(groups, SETTING, NEGATIVES).sentence.count("no std to compare with") == 2


def test_a_record_names_the_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 9000\n")
    assert processor(tmp_path / "cpuinfo") == "Abacus 9000"
    assert processor(tmp_path / "missing") != ""
    assert processor() in environment(torch.device("cpu"))["device"]


# The command


class Page(HTMLParser):
    """Which elements are open, what is referred to, and each table's rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[bytes] = []
        self.widths: list[list[int]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag == "img":
            assert values["alt"]
            self.images.append(base64.b64decode((values["src"] or "").removeprefix("data:image/png;base64,")))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "table":
            assert self.open[-2] == "div"  # which scrolls
            self.widths.append([])
        if tag == "tr":
            self.widths[-1].append(0)
        if tag in ("td", "th"):
            self.widths[-1][-1] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


STARTS = [{"time": "2026-01-01T00:00:00+00:00", "step": 0}, {"time": "2026-01-02T03:04:05+00:00", "step": 14}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the paper's own setting and of another data set, with curves, doubles, damage and a failed run."""
    root = tmp_path_factory.mktemp("runs")
    pascal = {"dataset": "PASCAL-5i"}
    for i, variant in enumerate(["pfenet", "bgem", "bgem_doem", "full", "channels_512", "per_scale"]):
        for fold in range(4):
            folder = write(root / f"{variant}_{fold}", results(variant, fold, 0, [50.0 + i, 52.0 + i], **pascal))
            lines = [{"step": s * (10 + fold), "miou": s / 10, "loss": {"total": 1 / s}} for s in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            finished = {"steps": 30, "seconds": 7200.0, "peak_memory_mib": 2048.0}
            write(
                folder,
                {"device": "abacus", "git_revision": "1" * 40, "finished": finished, "starts": STARTS},
                "run.json",
            )
    old = write(root / "old", results("full", 0, 0, [99.0, 99.0], **pascal)) / "results.json"
    os.utime(old, (1, 1))
    write(root / "toy", results("bgem", 2, 0, [40.0]))
    (root / "toy/results_damaged.json").write_text('{"dataset": "Toy')
    write(root / "toy", {"something": "else"}, "results_foreign.json")
    write(root / "toy", results("full", 1, 0, [float("nan")]), "results_nan.json")
    write(root / "crashed", {"device": "abacus"}, "run.json")
    return root


def test_the_command_writes_a_report_and_says_where(runs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/report.py", str(runs), "--out", str(tmp_path / "report")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, *summary = done.stdout.splitlines()
    assert str(tmp_path / "report/report.md") in first
    assert str(tmp_path / "report/report.html") in first
    assert len(summary) == 5
    assert "Table 3 on PASCAL-5i, ResNet-50, 1-shot holds" in done.stdout
    problems = done.stderr.splitlines()
    assert len(problems) == 3
    assert all(line.startswith("warning: skipped") for line in problems)
    for name in ("damaged", "foreign", "nan"):
        assert sum(f"results_{name}.json" in line for line in problems) == 1


def test_the_report_holds_every_run_and_hides_no_failure(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = command(monkeypatch, runs, tmp_path)
    assert "25 counted, 1 replaced by newer ones, 1 without results, skipped files 3" in text
    for path in runs.rglob("results*.json"):
        assert f"`{path}" in text
    assert f"- `{runs}/crashed`: unfinished" in text
    (line,) = [line for line in text.splitlines() if f"`{runs}/bgem_2/results.json`" in line]
    assert "resumed at step 14, 2026-01-02T03:04:05+00:00" in line
    (line,) = [line for line in text.splitlines() if f"`{runs}/old/results.json`" in line]
    assert "replaced by a newer file" in line
    assert row_of(text, "ResNet-50", "NTRENet, ours")[0] == "54.0 ± 1.4† (-11.4)"  # not 99.0
    assert row_of(text, "ResNet-50", "PFENet, ours")[4] == "51.0 ± 1.4† (-9.8)"
    assert row_of(text, "VGG-16", "NTRENet, ours") == ["not run"] * 6
    assert not any(line.startswith("| VGG-16 | PFENet, ours") for line in text.splitlines())
    paper, others = text.split("## Toy-5i")
    assert row_of(paper, "✓", "", "", "ours")[4] == "52.0 ± 1.4† (-10.4)"
    assert row_of(others, "✓", "", "", "ours") == ["not run", "not run", "40.0", "not run", "-", "60.0"]
    assert "Precision, fold 2" in others
    assert row_of(text, "512", "ours")[4] == "**55.0 ± 1.4†**"
    assert row_of(text, "at each FEM scale (per_scale)", "ours")[4] == "**56.0 ± 1.4†**"
    assert row_of(text, "PASCAL-5i", "ResNet-50", "1", "full")[:4] == ["4", "2.00", "2048", "5.0"]
    assert row_of(text, "Toy-5i", "ResNet-50", "1", "bgem")[:3] == ["1", "not measured", "not measured"]


def test_the_html_is_one_well_formed_file_with_the_pictures_inside(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    markdown = command(monkeypatch, runs, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    assert 'name="viewport"' in text
    assert all(len(set(widths)) == 1 for widths in page.widths)
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert sorted(pictures) == sorted(path.name for path in tmp_path.glob("*.png"))
    assert page.images == [(tmp_path / name).read_bytes() for name in pictures]
    assert len(pictures) == 2  # curves and channels of PASCAL-5i


def test_markdown_tables_have_as_many_cells_in_each_row(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = command(monkeypatch, runs, tmp_path).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) > 8
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    assert all(set(lines[1]) == set("|- ") for lines in tables)


def test_the_same_runs_give_the_same_files(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in ("a", "b"):
        command(monkeypatch, runs, tmp_path / out)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_a_file_of_lines_gives_the_same_tables_as_its_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_runs, lines = command(monkeypatch, runs, tmp_path / "a"), tmp_path / "results.jsonl"
    for source, target in ((runs, lines), (lines, tmp_path / "again.jsonl")):
        monkeypatch.setattr(sys, "argv", ["report.py", str(source), "--lines", str(target)])
        report.main()
    assert lines.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", ["report.py", str(lines), "--out", str(tmp_path / "b")])
    report.main()
    from_lines = (tmp_path / "b/report.md").read_text()
    for cells in (["ResNet-50", "NTRENet, ours"], ["PASCAL-5i", "ResNet-50", "1", "full"], ["✓", "", "", "ours"]):
        assert row_of(from_lines, *cells) == row_of(from_runs, *cells)


def test_a_folder_without_results_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "runs/started", {"device": "abacus"}, "run.json")
    with pytest.raises(report.UserError, match=r"1 runs there have none yet.*run 'python test.py --config"):
        command(monkeypatch, tmp_path / "runs", tmp_path / "out")
    with pytest.raises(report.UserError, match="is not a folder"):
        command(monkeypatch, tmp_path / "elsewhere", tmp_path / "out")


def test_results_of_another_variant_than_the_training_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "runs/a", results("full"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config("bgem_doem")))
    assert "counts as full by its own config, but was trained as bgem_doem" in command(
        monkeypatch, tmp_path / "runs", tmp_path / "out"
    )
