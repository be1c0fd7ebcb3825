"""Telling the user about slow or unfinished set-ups.

Programs listen on either of two channels, Python's warnings and the logger, depending on the release they were
written for; we speak on both. A warning with the same text appears once, a log record every time.
"""

from __future__ import annotations

import logging
import re
import warnings

import torch

__all__ = ["logger", "notify"]

logger = logging.getLogger("bitsandbytes.nn.modules")


def notify(message: str) -> None:
    """Warn and log ``message``; nothing while a graph is being traced."""
    if torch.compiler.is_compiling():
        return
    logger.warning(message)
    warnings.warn(message, UserWarning, stacklevel=4)
    warnings.filterwarnings("ignore", message=re.escape(message), category=UserWarning)
