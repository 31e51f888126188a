"""What both apps import first: are the project's files here? And mistakes become one line.

Flower sends a machine this folder alone. data.py to train.py must be on PYTHONPATH of
flower-superlink and of every flower-supernode, or copied into this folder.
"""

import importlib.util
import logging


def one_line(record):
    """A filter of Flower's log: a mistake of the user's has no traceback."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, (ValueError, OSError, IndexError, ImportError)):
        record.msg, record.args, record.exc_info = "%s", (error,), None
    return True


logging.getLogger("flwr").addFilter(one_line)
for name in ("data", "eval", "federated", "losses", "model", "train"):
    if not importlib.util.find_spec(name):
        raise ModuleNotFoundError(f"{name}.py is not on this machine's PYTHONPATH")
