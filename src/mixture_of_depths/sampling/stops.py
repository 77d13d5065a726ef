"""Stop strings: text that comes piece by piece ends where one of them begins."""


class StopStrings:
    """Lets text through until a stop string begins, and holds back what may become one.

    Attributes:
        has_stopped: whether one has come; nothing is let through from then on.
        held: what is held back.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.has_stopped = False
        self.held = ""

    def let_through(self, piece: str) -> str:
        """Takes the next piece of a text; returns what is known to stand before any stop string."""
        text = self.held + piece
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        if places:
            self.has_stopped, self.held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, string) for string in self.strings), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` with which `string` begins."""
    return max((size for size in range(1, min(len(text), len(string)) + 1) if text.endswith(string[:size])), default=0)
