"""Counts and scores against scikit-learn and against numbers worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import jaccard_score, precision_score

from util.engine.metrics import Scores, confusion, interval, iou, mask_iou, resampled_miou, scores

CLASSES = {3: "cat", 7: "dog", 4: "cow"}
Made = list[tuple[np.ndarray, np.ndarray, int]]


def episodes(seed: int, count: int = 40, ignored: float = 0.2) -> Made:
    """Predictions, ground truths and class ids, of several sizes and shares of foreground."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        shape = tuple(rng.integers(1, 40, 2))
        truth = (rng.random(shape) < rng.random()).astype(np.uint8)
        prediction = np.where(rng.random(shape) < 0.3, rng.random(shape) < 0.5, truth == 1)
        truth[rng.random(shape) < ignored] = 255
        made.append((prediction, truth, list(CLASSES)[number % 3 if number < 9 else int(rng.integers(3))]))
    return made


def count(made: Made) -> np.ndarray:
    """Counts (N, 4)."""
    pairs = [(torch.from_numpy(prediction), torch.from_numpy(truth)) for prediction, truth, _ in made]
    return np.stack([confusion(*pair).numpy() for pair in pairs]) if made else np.zeros((0, 4), int)


def scored(made: Made, classes: dict[int, str] = CLASSES) -> Scores:
    return scores(count(made), np.array([class_id for _, _, class_id in made], int), classes)


def flat(made: Made) -> tuple[np.ndarray, np.ndarray]:
    """All ground truths and predictions in a row, without the ignored pixels."""
    truth = np.concatenate([t.ravel() for _, t, _ in made])
    prediction = np.concatenate([p.ravel() for p, _, _ in made])
    return truth[truth != 255], prediction[truth != 255].astype(int)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_those_of_scikit_learn(seed: int) -> None:
    made = episodes(seed)
    found = scored(made)
    by_class = {name: flat([e for e in made if e[2] == class_id]) for class_id, name in CLASSES.items()}
    ious = {name: jaccard_score(*pair) for name, pair in by_class.items()}
    assert found.per_class == pytest.approx(ious, abs=1e-12)
    assert found.miou == pytest.approx(np.mean(list(ious.values())), abs=1e-12)
    truth, prediction = flat(made)
    foreground, background = jaccard_score(truth, prediction), jaccard_score(truth, prediction, pos_label=0)
    assert found.fb_iou == pytest.approx((foreground + background) / 2, abs=1e-12)
    assert found.precision == pytest.approx(precision_score(truth, prediction), abs=1e-12)


def episode(tp: int, fp: int, fn: int, tn: int, class_id: int, ignored: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """An episode with these counts, one pixel high."""
    truth = np.repeat([1, 0, 1, 0, 255], [tp, fp, fn, tn, ignored]).astype(np.uint8)[None]
    prediction = np.repeat([True, True, False, False, True], [tp, fp, fn, tn, ignored])[None]
    return prediction, truth, class_id


def test_miou_is_the_mean_over_classes_of_the_iou_of_summed_counts() -> None:
    made = [
        episode(tp=90, fp=5, fn=5, tn=0, class_id=3),  # IoU 0.9
        episode(tp=0, fp=10, fn=10, tn=80, class_id=3),  # IoU 0; together 90 / 120 = 0.75
        episode(tp=1, fp=1, fn=2, tn=96, class_id=7),  # 1 / 4 = 0.25
    ]
    found = scored(made, {3: "cat", 7: "dog"})
    assert found.per_class == {"cat": 0.75, "dog": 0.25}
    assert found.miou == 0.5  # neither (0.9 + 0 + 0.25) / 3 nor (0.45 + 0.25) / 2 nor 91 / 124


def test_no_episode_at_all_gives_finite_scores_and_a_class_without_an_episode_counts_as_0() -> None:
    nothing = scored([])
    assert all(math.isfinite(value) for value in (*nothing[:3], *nothing.per_class.values()))
    assert list(nothing.per_class) == ["cat", "dog", "cow"]
    one = scored([episode(tp=3, fp=0, fn=1, tn=0, class_id=7)], {3: "cat", 7: "dog"})
    assert (one.per_class, one.miou) == ({"cat": 0.0, "dog": 0.75}, 0.375)
    with pytest.raises(ValueError, match="classes \\[5\\]"):
        scored([episode(1, 1, 1, 1, class_id=5)])


def of_samples(counts: np.ndarray, ids: np.ndarray, statistic: Any) -> tuple[float, float]:
    """The interval of scipy's bootstrap, which draws the episodes of each class for itself."""
    groups = [np.flatnonzero(ids == c) for c in np.unique(ids)]
    found = bootstrap(groups, statistic, n_resamples=2000, vectorized=False, method="percentile", rng=1)
    return found.confidence_interval


def test_intervals_and_those_of_paired_differences_are_scipys() -> None:
    one, other = count(episodes(0, 120)), count(episodes(1, 120))
    ids = np.array([class_id for _, _, class_id in episodes(0, 120)])
    other = (3 * one + other) // 4  # a method that finds the same episodes hard

    def miou(counts: np.ndarray, *groups: np.ndarray) -> float:
        sums = [counts[group].sum(0) for group in groups]
        return float(np.mean([tp / (tp + fp + fn) for _, fp, fn, tp in sums]))

    samples = [resampled_miou(counts[None], ids[None], 3) for counts in (one, other)]
    expected = of_samples(one, ids, lambda *groups: miou(one, *groups))
    assert interval(samples[0]) == pytest.approx(list(expected), abs=0.003) and expected[1] - expected[0] > 0.02
    expected = of_samples(one, ids, lambda *groups: miou(other, *groups) - miou(one, *groups))
    assert interval(samples[1] - samples[0]) == pytest.approx(list(expected), abs=0.003)
    alone = np.subtract(*interval(samples[1])[::-1])
    assert expected[1] - expected[0] < 0.6 * alone, "pairs are sharper"


def test_seeds_are_drawn_apart_and_a_class_without_an_episode_counts_as_0() -> None:
    one = count(episodes(0, 60))
    ids = np.array([class_id for _, _, class_id in episodes(0, 60)])
    single, twice = (resampled_miou(np.stack([one] * n), np.stack([ids] * n), 3) for n in (1, 2))
    assert twice.mean() == pytest.approx(single.mean(), abs=0.005)
    assert twice.std() == pytest.approx(single.std() / math.sqrt(2), rel=0.1)
    assert resampled_miou(one[None], ids[None], 6) == pytest.approx(single / 2)


def test_counts_do_not_overflow_over_a_whole_evaluation() -> None:
    (one,) = count([episode(5, 4, 3, 2, 1)])
    assert one.tolist() == [2, 4, 3, 5]
    assert scores(np.stack([one, np.full(4, 2**40)]), np.array([1, 1]), {1: "a"}).miou == pytest.approx(1 / 3)


def test_an_episode_without_target_and_prediction_is_perfect_alone_and_as_a_class() -> None:
    empty = episode(tp=0, fp=0, fn=0, tn=5, class_id=3)
    made = [episode(tp=6, fp=2, fn=4, tn=9, class_id=3), empty]
    assert iou(count(made)).tolist() == [0.5, 1.0]
    assert [mask_iou(*one[:2]) for one in made] == [0.5, 1.0]
    assert scored([empty], {3: "cat"})[:2] == (1.0, 1.0)
