"""The mistakes that a user can make."""


class UsageError(ValueError):
    """Bad input. The message is one line that names the value, what is allowed and the fix; command lines print it and
    exit with code 2."""


class PolicyError(UsageError):
    """A policy, or a total-KV cap, that cannot be meant; the message names value, range and fix."""


class UnavailableError(UsageError):
    """A method that cannot be measured here, or not in that way; the message says what it lacks."""


class UnsupportedModelError(UsageError):
    """The engine cannot evaluate this model exactly; the message says why."""


class TextError(UsageError):
    """No such text, or too little of it; the message says what to give instead."""


def shown(value: object, most: int = 100) -> str:
    """A value as a message shows it: its repr, of a long one the beginning."""
    if isinstance(value, int) and value.bit_length() > 4 * most:  # Python refuses to write thousands of digits
        return f"{'-' * (value < 0)}{abs(value) >> (value.bit_length() - 4 * most):#x}..."
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def reason_of(error: BaseException, most: int = 200) -> str:
    """The first line that a library's error says anything in, the next one too if that is announced, or its kind."""
    lines = [said for line in str(error).splitlines() if (said := plain(line, most))]
    first = lines[: 2 if lines and lines[0].endswith(":") else 1]
    return " ".join(first)[:most] or type(error).__name__


def one_line(error: BaseException, most: int = 300) -> str:
    """Its kind, which may say more than its text, and all of its lines as far as there is room."""
    kind, said = type(error).__name__, plain(" ".join(str(error).split()), most)
    return f"{kind}: {said}" if said else kind


def plain(text: str, most: int = 100) -> str:
    """A text for the middle of a line: of a long one the beginning, and a blank for what would not print."""
    return "".join(c if c.isprintable() else " " for c in text[:most]).strip()
