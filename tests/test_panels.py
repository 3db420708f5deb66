"""Which episodes the panels show: the best, the worst and random ones."""

import numpy as np

from util.engine.panels import choose


def test_best_and_worst_are_the_highest_and_lowest_and_random_ones_are_others() -> None:
    iou = np.array([0.5, 0.9, 0.1, 0.7, 0.3, 0.2, 0.8])
    chosen = choose(iou, 2)
    assert chosen["best"] == [1, 6]
    assert chosen["worst"] == [2, 5]
    assert len(chosen["random"]) == 2
    assert set(chosen["random"]) < {0, 3, 4}
    assert choose(iou, 2) == chosen


def test_few_episodes_are_shown_once_each() -> None:
    for episodes in range(1, 7):
        shown = [n for numbers in choose(np.linspace(0, 1, episodes), 2).values() for n in numbers]
        assert sorted(shown) == list(range(episodes))
