"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can fix: one line that names the thing and says what to do. No traceback is shown."""
