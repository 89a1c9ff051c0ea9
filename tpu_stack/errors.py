"""The one exception a user is meant to see.

Raise `UserError` for input the user can mend: the command line prints it as a single line on
standard error and exits with status 2. Anything else that escapes is a bug and keeps its traceback.

>>> raise UserError("steps is -1; it must be at least 1")
Traceback (most recent call last):
tpu_stack.errors.UserError: steps is -1; it must be at least 1
"""


class UserError(Exception):
    """Bad input. The message is one line that names the value and what would be right."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
