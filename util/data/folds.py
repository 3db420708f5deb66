"""Novel and base classes of a fold. Class ids start at 1."""

from util.config import DataConfig
from util.errors import UserError


def novel_classes(data: DataConfig) -> tuple[int, ...]:
    """Return the ids of the classes that fold ``data.fold`` holds back for evaluation.

    contiguous: PASCAL-5i, fold i of 20 classes is 5i + 1 ... 5i + 5.
    interleaved: COCO-20i as in FWB, fold i of 80 classes is i + 1, i + 5, i + 9 ...
    """
    if data.folds is not None:
        return _kept(data, data.folds[data.fold])
    if data.fold_scheme == "interleaved":
        return _kept(data, data.classes[data.fold :: 4])
    size = len(data.classes) // 4
    return _kept(data, data.classes[data.fold * size : (data.fold + 1) * size])


def base_classes(data: DataConfig) -> tuple[int, ...]:
    """Return the ids of the classes that the fold trains on: ``data.base_classes``, or all that are not novel."""
    novel = set(novel_classes(data))
    if data.base_classes is None:
        return _kept(data, [name for number, name in enumerate(data.classes, 1) if number not in novel])
    base = _kept(data, data.base_classes)
    if shared := novel.intersection(base):
        name = data.classes[min(shared) - 1]
        raise UserError(f"class '{name}' is in data.base_classes and in fold {data.fold}; take it out of one of them")
    return base


def _kept(data: DataConfig, names: list[str]) -> tuple[int, ...]:
    """Return the ids of classes by name, ascending, without those in ``data.left_out``."""
    wanted = set(names).difference(data.left_out)
    if not wanted:
        raise UserError(
            f"data.left_out names all classes of fold {data.fold}, or no class is left to train on; choose another"
            " data.fold, or test a checkpoint of other data: test.py --across"
        )
    return tuple(number for number, name in enumerate(data.classes, 1) if name in wanted)
