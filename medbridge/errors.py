"""The one exception that the command line shows to a user as a single message, without a traceback."""

from __future__ import annotations


class MedbridgeError(Exception):
    """A problem the user can mend. The message says what was found, where, and the cure."""
