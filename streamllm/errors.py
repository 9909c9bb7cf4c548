"""What a user can get wrong."""


class UsageError(ValueError):
    """Bad input. The message is one line that names the value, what is allowed and the fix; command lines print it and
    exit with code 2."""


class UnsupportedModelError(UsageError):
    """The engine cannot evaluate this model exactly; the message says why."""
