"""Novel and base classes of a fold. Class ids start at 1."""

from util.config import DataConfig
from util.errors import UserError


def novel_classes(data: DataConfig) -> tuple[int, ...]:
    """Return the ids of the classes that fold ``data.fold`` holds back for evaluation.

    contiguous: PASCAL-5i, fold i of 20 classes is 5i + 1 ... 5i + 5.
    interleaved: COCO-20i as in FWB, fold i of 80 classes is i + 1, i + 5, i + 9 ...
    """
    if data.folds is not None:
        return _ids(data, data.folds[data.fold])
    count = len(data.classes)
    if data.fold_scheme == "interleaved":
        return tuple(range(data.fold + 1, count + 1, 4))
    size = count // 4
    return tuple(range(data.fold * size + 1, (data.fold + 1) * size + 1))


def base_classes(data: DataConfig) -> tuple[int, ...]:
    """Return the ids of the classes that the fold trains on: ``data.base_classes``, or all that are not novel."""
    novel = set(novel_classes(data))
    if data.base_classes is None:
        return tuple(c for c in range(1, len(data.classes) + 1) if c not in novel)
    base = _ids(data, data.base_classes)
    if shared := novel.intersection(base):
        name = data.classes[min(shared) - 1]
        raise UserError(f"class '{name}' is in data.base_classes and in fold {data.fold}; take it out of one of them")
    return base


def _ids(data: DataConfig, names: list[str]) -> tuple[int, ...]:
    """Return the ids of classes by name, ascending."""
    wanted = set(names)
    return tuple(number for number, name in enumerate(data.classes, 1) if name in wanted)
