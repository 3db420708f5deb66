"""scripts/report.py: the paper's figures, which row a run is, means against numpy, and the files written."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scripts import report
from scripts.report import Run
from tests.harness import ROOT, call, refused, succeeded
from util.config import load_config

PAPER = yaml.safe_load((ROOT / "scripts/paper.yaml").read_text())
TABLE3, TABLE4 = PAPER["table3"]["rows"], PAPER["table4"]["rows"]
ROWS = {key: row for table in report.ablations(PAPER).values() for key, row in table["rows"].items()}
SETTING = "Toy-5i, ResNet-50, 1-shot, protocol pfenet"


def config(row: str = "full", **changes: Any) -> dict[str, Any]:
    """NTRENet's default config with the switches of a row of paper.yaml, and ``changes`` such as model={'x': True}."""
    values = load_config(ROOT / "configs/pascal/resnet50_fold0_1shot.yaml").model_dump()
    for key, value in ROWS[row].items():
        section, dot, name = key.partition(".")
        if dot:
            values[section][name] = value
    for section, new in changes.items():
        values[section] = values[section] | new
    return values


def results(row: str = "full", fold: int = 0, seed: int = 0, miou: Any = (50.0,), **keys: Any) -> dict[str, Any]:
    """A results.json; FB-IoU is 10 above the mIoU and precision 20."""
    scores = {
        name: {"per_seed": [m + more for m in miou]}
        for name, more in (("miou", 0.0), ("fb_iou", 10.0), ("precision", 20.0))
    }
    return {
        **{"dataset": "Toy-5i", "fold": fold, "folds": 4, "shots": 1, "backbone": "resnet50", "episodes": 1000},
        **{"seeds": list(range(len(miou))), "train_seed": seed, "config": config(row), "list_sha256": "a" * 64},
        "dtype": "float32", "protocol": None,
        "environment": {"device": "abacus", "git_revision": "1" * 40, "git_clean": True},
    } | scores | keys  # fmt: skip


def write(folder: Path, values: dict[str, Any], name: str = "results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder / name


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A function that reads the results file that ``results`` makes from its arguments."""

    def read(*args: Any, modified: str = "2026-01-01", **keys: Any) -> Run:
        found = report.read_run(write(tmp_path, results(*args, **keys)))
        return found.model_copy(update={"modified": modified})

    return read


def row_of(markdown: str, *cells: str) -> list[str]:
    """The cells after ``cells`` in the first row that begins with them."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    return next(line[len(cells) :] for line in lines if line[: len(cells)] == list(cells))


def test_the_papers_means_are_those_of_its_folds_except_in_one_row() -> None:
    tables = [row for table in ("table1", "table2") for row in PAPER[table]["rows"]]
    rows = [(row["method"], row[shots]) for row in tables for shots in ("1-shot", "5-shot")]
    rows += [(key, row["paper"]) for table in (TABLE3, TABLE4) for key, row in table.items()]
    wrong = [key for key, row in rows if row[0] is not None and abs(np.mean(row[:4]) - row[4]) > 0.1 + 1e-6]
    assert wrong == ["MMNet"]
    full = [65.4, 72.3, 59.4, 59.8, 64.2, 77.0]
    assert ("NTRENet", full) in rows and full[:5] == TABLE3["full"]["paper"][:5] == TABLE4["full"]["paper"]


def test_each_file_of_configs_ablation_and_each_width_of_figure_6_is_a_row_on_any_config(run: Any) -> None:
    for path in (ROOT / "configs").glob("*/*_fold0_1shot.yaml"):
        networks = {"full": load_config(path), "channels_512": load_config(path, ["model.prototype_channels=512"])}
        networks |= {file.stem: load_config([path, file]) for file in (ROOT / "configs/ablation").glob("*.yaml")}
        for row, values in networks.items():
            settings, _ = report.arrange([run(config=values.model_dump())], PAPER)
            assert [list(rows) for rows in settings.values()] == [[row]]


def test_a_run_that_paper_yaml_does_not_list_is_a_row_of_table_3_by_its_departures(run: Any) -> None:
    """A fork's switch or number, another weight of a loss: none takes the place of NTRENet or PFENet."""
    changes = {
        "+ model.boundary=true": config(model={"boundary": True}),
        "+ model.depth=3, loss.boundary=0.5": config(model={"depth": 3}, loss={"boundary": 0.5}),
        "+ loss.pcl=0.1": config(loss={"pcl": 0.1}),
        "+ model.bgem=false, model.doem=false, model.x=1, loss.pcl=0": config("pfenet", model={"x": 1}),
    }
    runs = [run("full", fold, 0, [50.0]) for fold in range(4)]
    runs += [run("full", f, 0, [60.0], config=c, modified="2027") for c in changes.values() for f in range(4)]
    settings, replaced = report.arrange(runs, PAPER)
    assert replaced == [] and list(settings) == [SETTING]
    text = next(part for part in report.tables(settings, PAPER) if part.startswith("| Network"))
    assert row_of(text, "+ PCL (NTRENet)")[4] == "50.0"
    for label in changes:
        assert row_of(text, label)[4:6] == ["60.0", "+10.0"]  # the margin is to NTRENet


def test_a_method_that_is_not_ours_is_no_row_of_our_networks(run: Any, tmp_path: Path) -> None:
    write(tmp_path, {"novel": {"auc": {"other objects": 99.0}, "miou": {"0.5": 98.0}}}, "diagnosis.json")
    write(tmp_path, {"finished": {"seconds": 3600}}, "run.json")
    other = run("full", method="mine:segment")  # in the folder of a training
    assert (other.auc, other.best, other.training_hours) == (None, None, None)
    assert run("full").auc == [99.0]
    settings, _ = report.arrange([run("full"), run("full", method="mine:segment", modified="2027")], PAPER)
    found = {setting: list(rows) for setting, rows in settings.items()}
    assert found == {SETTING: ["full"], "Toy-5i, other methods, 1-shot, protocol pfenet": ["mine:segment"]}


def test_figures_of_other_protocols_and_of_networks_of_other_data_share_no_table(run: Any) -> None:
    runs = [run("full"), run("full", config=config(data={"novel_in_train": "drop"})), run("full", trained_on="B")]
    runs.append(run("full", config=config(data={"min_area": 1})))
    settings, replaced = report.arrange(runs, PAPER)
    by_protocol = [SETTING, SETTING.replace("pfenet", "bam"), SETTING.removesuffix(", protocol pfenet")]
    assert replaced == [] and set(settings) == {*by_protocol, SETTING.replace("5i,", "5i trained on B,")}


def test_of_two_runs_of_one_cell_and_seed_the_newest_counts_not_the_best(run: Any) -> None:
    old, new = run("full", 0, 3, [90.0], modified="2026-01-01"), run("full", 0, 3, [10.0], modified="2026-01-02")
    settings, replaced = report.arrange([new, run("full", 0, 4), old], PAPER)
    assert replaced == [old]
    assert new in settings[SETTING]["full"]


def test_a_cell_is_the_mean_and_sample_deviation_over_training_seeds_or_those_of_the_evaluation(run: Any) -> None:
    values = np.array([[60.0, 62.0, 61.5], [58.0, 57.0, 63.5], [64.0, 61.0, 66.0]])  # training seed, evaluation seed
    got = report.score([run("full", 0, seed, list(row)) for seed, row in enumerate(values)], "precision")
    assert got.over == "training"
    assert got.mean == pytest.approx(values.mean() + 20)
    assert got.std == pytest.approx(values.mean(1).std(ddof=1))
    single = report.score([run("full", 0, 0, list(values[1]))], "miou")
    assert single == (pytest.approx(values[1].mean()), pytest.approx(values[1].std(ddof=1)), "evaluation")
    assert report.score([run("full", 0, 0, [60.0])], "miou").std is None


def test_the_mean_of_folds_deviates_over_the_training_seeds_that_all_folds_share(run: Any) -> None:
    values = np.random.default_rng(0).uniform(40, 70, (4, 3, 2))  # fold, training seed, evaluation seed
    cells = [run("full", fold, seed, list(values[fold, seed])) for fold in range(4) for seed in range(3)]
    got = report.score(cells, "miou")
    assert got.mean == pytest.approx(values.mean())
    assert got.std == pytest.approx(values.mean((0, 2)).std(ddof=1))


def line_of(*runs: Run, **keys: Any) -> dict[str, str]:
    (line,) = report.ladder({"full": list(runs)}, TABLE3, **keys)
    return line


def test_without_all_folds_there_is_no_mean(run: Any) -> None:
    three = [run("full", fold, 0, [50.0 + fold]) for fold in (0, 1, 3)]
    line = line_of(*three)
    assert [line[f"Fold {f}"] for f in range(4)] == ["50.0", "51.0", "not run", "53.0"]
    assert (line["Mean"], line["FB-IoU"]) == ("-", "-")
    line = line_of(*three, run("full", 2, 0, [52.0]))
    assert (line["Fold 2"], line["Mean"], line["FB-IoU"], line["Precision"]) == ("52.0", "51.5", "61.5", "71.5")


def test_a_cell_shows_the_deviation_a_random_backbone_and_the_difference_to_the_paper(run: Any) -> None:
    assert line_of(run("full", 0, 0, [65.0, 67.0]), next_to_paper=True)["Fold 0"] == "66.0 ± 1.4† (+0.6)"
    assert line_of(*(run("full", 0, seed, [50.0 + 2 * seed]) for seed in (0, 1)))["Fold 0"] == "51.0 ± 1.4"
    assert line_of(run(config=config(model={"weights": "random"})))["Fold 0"] == "50.0‡"


def test_a_warning_names_what_differs_between_runs_of_one_table(run: Any) -> None:
    changes = {
        "test_list": {"list_sha256": "b" * 64},
        "revision": {"environment": {"git_revision": "1" * 40, "git_clean": False}},
        "model.weights": {"config": config("full", model={"weights": "random"})},
    }
    for what, keys in changes.items():
        assert list(report.differences([run("full", 0), run("full", 1, **keys)])) == [what]
    elsewhere = config("bgem", data={"root": "/elsewhere"}) | {"run_dir": "elsewhere", "workers": 1, "seed": 3}
    assert report.differences([run("full", 0), run("bgem", 1, config=elsewhere)]) == {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the paper's own setting and of another data set, a replaced one, damaged files and a failed run."""
    root = tmp_path_factory.mktemp("runs")
    finished = {"steps": 1, "seconds": 7200.0, "peak_memory_mib": 2048.0}
    training = {"device": "abacus", "git_revision": "1" * 40, "finished": finished}
    for i, row in enumerate(["pfenet", "bgem", "full", "ours"]):
        for fold in range(4):
            results_file = results(row, fold, 0, [50.0 + i, 52.0 + i], dataset="PASCAL-5i")
            write(root / f"{row}_{fold}", training, "run.json")
            write(root / f"{row}_{fold}", results_file | {"calibrated": {"miou": {"per_seed": [60.0 + i] * 2}}})
    old = write(root / "old", results("full", 0, 0, [99.0, 99.0], dataset="PASCAL-5i"))
    os.utime(old, (1, 1))
    write(root / "toy", results("bgem", 2, 0, [40.0]))
    novel = {"miou": {"0.5": 40.0, "0.1": 41.5}, "auc": {"other objects": 70.0, "background": None}}
    write(root / "toy", {"novel": novel}, "diagnosis.json")
    (root / "toy/results_damaged.json").write_text('{"dataset": "Toy')
    write(root / "toy", results("full", 1, 0, [float("nan")]), "results_nan.json")
    write(root / "crashed", {"device": "abacus"}, "run.json")
    return root


def test_the_report_shows_our_runs_next_to_the_papers_and_hides_no_failure(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    done = succeeded(call(report, runs, "--out", out))
    assert "17 counted, 1 replaced by newer ones, 1 without results, skipped files 2" in done.out
    text = out.read_text()
    for name in ("damaged", "nan"):
        assert f"warning: skipped {runs}/toy/results_{name}.json" in done.err
        assert f"- {runs}/toy/results_{name}.json" in text
    assert f"- {runs}/crashed: unfinished" in text
    assert row_of(text, f"{runs}/old/results.json")[0] == "replaced by a newer run"
    costs = ["2.00", "2048", "abacus", "1111111"]
    assert row_of(text, f"{runs}/bgem_2/results.json", "bgem", "2", "0", "52.0")[:4] == costs
    assert row_of(text, "+ PCL (NTRENet)")[0] == "53.0 ± 1.4† (-12.4)"  # not 99.0
    cells = ["52.0 ± 1.4† (-10.4)", "+1.0", "72.0 ± 1.4† (+9.2)", "62.0 ± 1.4†", "61.0 ± 0.0†"]
    assert row_of(text, "+ BGEM")[4:9] == cells
    assert row_of(text, "ResNet-50", "PFENet, here")[4] == "51.0 ± 1.4† (-9.8)"
    cells = ["not run", "not run", "40.0", "not run", "-", "", "60.0", "50.0", "41.5", "70.0"]
    assert row_of(text.split("## Toy-5i")[1], "+ BGEM")[:10] == cells
    assert "ResNet-101" not in text  # not run
    assert call(report, runs).out.splitlines() == text.split("\n\n## Every run")[0].splitlines()[2:]


def test_a_jsonl_file_gives_the_same_tables_as_its_runs(runs: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    tables = call(report, runs, "--lines", lines).out.split("\n\n", 1)
    assert tables[1] in call(report, lines).out


def test_the_stored_results_are_read_and_give_the_published_table() -> None:
    """The means in README, which names no other place where they come from."""
    done = call(report, ROOT / "scripts/results.jsonl")
    assert done.err == ""
    synthetic = done.out.split("## Synthetic-5i, EfficientNet-Lite0, 1-shot, model.channels=64\n")[1]
    labels = [
        "PFENet",
        "as printed, BGEM alone",
        "as printed",
        "the authors' code",
        "ours",
        "ours, with a base learner",
    ]
    means = [row_of(synthetic, label)[4] for label in labels]
    assert f"| embedded set, 4 folds | {' | '.join(means)} |" in (ROOT / "README.md").read_text()


def of_episodes(path: Path, right: list[int], **keys: Any) -> Path:
    """Results on 40 episodes of two classes: so many of the target's 100 pixels are found, and nothing else."""
    rows = [f"900 0 {100 - hit} {hit}" for hit in right]
    names = ["a", "b"] * 20
    miou = float(np.mean([np.mean([hit for hit, of in zip(right, names, strict=True) if of == name]) for name in "ab"]))
    about = {"method": "mine:f", "episode_classes": names, "episodes_sha256": "1", "per_class": {"a": 0, "b": 0}}
    counts = {"counts": {"method": rows}, "miou": {"mean": miou, "per_seed": [miou]}}
    return write(path.parent, results() | about | counts | keys, path.name)


def test_two_results_are_compared_in_pairs_or_it_says_why_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(20, 80, 40)
    better = right + rng.integers(0, 5, 40)
    a = of_episodes(tmp_path / "a.json", right.tolist())
    b = of_episodes(tmp_path / "b.json", better.tolist())
    done = call(report, "--compare", a, b)
    title, _, one, other, difference = done.out.splitlines()
    assert title == "Toy-5i, fold 0 of 4 alone, 1-shot, 40 episodes"
    gain = (better - right).mean()
    assert [row.split()[1] for row in (one, other)] == [f"{right.mean():.1f}", f"{better.mean():.1f}"]
    _, mean, low, _, high = difference.split()
    assert (mean, float(low) < gain < float(high)) == (f"{gain:+.1f}", True)
    error = (better - right).std() / 40**0.5
    assert float(high) - float(low) == pytest.approx(2 * 1.96 * error, rel=0.3)  # 15 if they were not paired

    for words, keys in {
        "fold is 0 in one and 1": {"episodes_sha256": "2", "fold": 1},
        "other images were drawn": {"episodes_sha256": "2"},
        "of other masks": {"counts": {"method": ["1 0 1 1"] * 40}},
    }.items():
        refused(call(report, "--compare", a, of_episodes(tmp_path / "c.json", better.tolist(), **keys)), words)
    refused(call(report, "--compare", a, write(tmp_path, results(), "old.json")), "old.json holds no counts")
