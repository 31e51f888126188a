"""What both apps import first: are the project's files here? And a mistake becomes one line.

Flower sends a machine this folder alone. data.py to train.py must be on PYTHONPATH of
flower-superlink and of every flower-supernode, or copied into this folder.
"""

import contextlib
import importlib.util
import logging


class Mistake(Exception):
    """A mistake of the user's: Flower's log shows its text alone. A bug keeps its traceback."""


@contextlib.contextmanager
def user_input():
    """Within it, where values, files and nodes are checked, an error is the user's mistake."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Mistake(error) from error


def in_one_line(record):
    """A filter of Flower's log: it takes the traceback of a mistake away."""
    if record.exc_info and isinstance(record.exc_info[1], Mistake):
        record.msg, record.args, record.exc_info = "%s", (record.exc_info[1],), None
    return True


logging.getLogger("flwr").addFilter(in_one_line)
for name in ("data", "eval", "federated", "losses", "model", "train"):
    if not importlib.util.find_spec(name):
        raise Mistake(f"{name}.py is not on this machine's PYTHONPATH")
