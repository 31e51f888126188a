"""Mistakes in one line: what both apps import first.

Flower sends a node this folder alone. The project's own files, data.py to train.py, must be on
PYTHONPATH of flower-superlink and flower-supernode, or copied into this folder.
"""

import logging


def one_line(record):
    """A logging filter for Flower's log: a user's mistake has no traceback."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, (ValueError, OSError, ImportError)):
        hint = (
            ": is the folder of train.py on PYTHONPATH?"
            if error.__class__ is ModuleNotFoundError
            else ""
        )
        record.msg, record.args, record.exc_info = "%s%s", (error, hint), None
    return True


logging.getLogger("flwr").addFilter(one_line)
