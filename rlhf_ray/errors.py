"""The exceptions that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can fix: one line that names the thing and says what to do. No traceback is shown."""


class RunFailed(Exception):
    """The run ended badly and has left a post-mortem, whose summary was shown. No traceback is shown."""
