"""The first import of every command: mistakes of the user end in one line and exit code 2, not in a traceback.

It needs nothing but Python itself, so that it can say which packages are missing.
"""

import os
import re
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import NoReturn

from util.errors import WORKER_KILLED, UserError

PACKAGES = "torch torchvision numpy cv2 PIL yaml pydantic tensorboard tqdm scipy tabulate"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # torch's words for a GPU and for a CPU


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's ``main`` and exit: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    # shells leave a quoted ~, and that of --out=~/x and data.root=~/x, as it is
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home raises without a home)
    sys.argv[1:] = [re.sub("(^|=)~(?=/)", lambda found: found[1] + home, word, count=1) for word in sys.argv[1:]]
    # TensorBoard's thread prints an error that it raises again in the main one
    threading.excepthook = lambda failed: (
        None if issubclass(failed.exc_type, OSError) else threading.__excepthook__(failed)
    )
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _refuse(f"cannot write or read {error.filename}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        from model.weights import WeightsError  # imports torch, which takes seconds

        if isinstance(error, WeightsError):
            _refuse(str(error))
        if str(error).startswith("DataLoader worker (pid"):  # torch raises it wherever the main process is
            _refuse(WORKER_KILLED)
        if "Too many open files" in str(error):
            _refuse("too many open files; raise the limit with 'ulimit -n 4096', or lower workers")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        _refuse(f"out of memory ({error}); lower train.batch_size, eval.batch_size or data.image_size")
    sys.exit(0)


def _refuse(reason: str) -> NoReturn:
    print("error: " + " ".join(reason.split()), file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 11):  # noqa: UP036 (an older Python can read this file)
    _refuse(f"Python 3.11 or newer is needed, and {sys.executable} is {sys.version.split()[0]}")
try:
    import fcntl  # noqa: F401 (on Windows there is none)
except ImportError:
    _refuse("Windows is not supported; use Linux, macOS, or Windows' own Linux (WSL 2)")
for package in PACKAGES.split():
    if find_spec(package) is None:
        remedy = "activate the environment or run 'pip install -r requirements.txt' first"
        _refuse(f"{sys.executable} has no package '{package}'; {remedy}")
