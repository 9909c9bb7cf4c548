"""The mistakes that a user can make."""


class UsageError(ValueError):
    """Bad input. The message is one line that names the value, what is allowed and the fix; command lines print it and
    exit with code 2."""


class UnavailableError(UsageError):
    """A method that cannot be measured here, or not in that way; the message says what it lacks."""


class UnsupportedModelError(UsageError):
    """The engine cannot evaluate this model exactly; the message says why."""


class TextError(UsageError):
    """No such text, or too little of it; the message says what to give instead."""
