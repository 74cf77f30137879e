"""CaseOps: a reversible transform that moves the case of ASCII words into operator characters.

    "The NASA iPhone"  <->  "<TITLE>the <ALLCAPS>nasa i<CAPNEXT>phone"

The four operators are private-use characters, 3 bytes each in UTF-8 and worth 0 bytes of the original text. Over
maximal runs of ASCII letters:

1. all lower case                 the run
2. all upper case, 2 or more      ALLCAPS + the run in lower case
3. anything else                  TITLE if the first letter is upper case; then the run in lower case with CAPNEXT
                                  before every later capital

A raw operator character is written as ESC + the character; every other character stands for itself. `decode` takes
every string that `encode` makes and also harmless spellings that `encode` never chooses (CAPNEXT at the start of a
word, ALLCAPS on one letter); a dangling, doubled or misplaced operator is a `CaseOpsError`.

There are two forms, which differ where a word with an operator follows a space:

    BEHIND_SPACE     "a The"  ->  "a <TITLE>the"     bit-compatible with the published transform of that name (#1729)
    BEFORE_SPACE     "a The"  ->  "a<TITLE> the"     the word keeps the piece " the" that it has elsewhere

A lone surrogate, which a JSON document can hold, is a character like any other to `encode` and `decode`; it has no
UTF-8 form, so `piece_bytes` refuses it.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

BEHIND_SPACE = "lossless_caps_caseops_v1"
BEFORE_SPACE = "lossless_caps_before_space_v1"
NAME = BEHIND_SPACE  # of the form that is used unless another is named
TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"

_OPERATOR = re.compile("[\ue001-\ue004]")
_ESCAPED = re.compile("\ue004[\ue001-\ue004]")
_BEFORE_SPACE = re.compile("\ue004[\ue001-\ue004]|([\ue001\ue002]) ")
# Each pattern starts with a character class: `re` then skips plain text at memory speed, which a leading look-behind
# would prevent.
_CAPITALS_INSIDE_WORD = re.compile("[A-Z](?<=[a-z][A-Z])[A-Z]*")
_CAPITALISED = re.compile("([A-Z][A-Za-z]*)")
_CASED = re.compile("(\ue001\ue003?[A-Za-z]|\ue002[A-Za-z\ue003]+|\ue003[A-Za-z]|\ue004[\ue001-\ue004])")
_MALFORMED = re.compile(
    "[\ue001-\ue004](?:(?<=\ue004)|(?<=\ue003)(?![A-Za-z])|(?<=[\ue001\ue002])(?:(?<=[A-Za-z].)|(?!\ue003?[A-Za-z])))"
)


class CaseOpsError(ValueError):
    """Malformed CaseOps text; `position` is the index of the offending character in the encoded text (the joined
    surfaces for `piece_bytes`)."""

    def __init__(self, message: str, position: int):
        super().__init__(f"{message} at character {position}")
        self.message, self.position = message, position

    def __reduce__(self):  # survives the trip from a worker process
        return type(self), (self.message, self.position)


class _Table(dict):
    """Remembers a function of short strings: `table[string]` costs one dict lookup when it is known, half of what
    lru_cache takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __missing__(self, key: str):
        value = self.function(key)
        if len(key) <= 32 and len(self) < 1 << 16:  # bounded: at most some megabytes
            self[key] = value
        return value


def encode(text: str, form: str = NAME) -> str:
    """The CaseOps form of any string; `decode` with the same form gives the string back."""
    if not text.isascii():
        text = _OPERATOR.sub(ESC + r"\g<0>", text)
    # "McDoNALD": capitals after a small letter first, so that what is left of a word begins with its capitals.
    text = _CAPITALS_INSIDE_WORD.sub(lambda run: CAPNEXT + CAPNEXT.join(run[0].lower()), text)
    parts = _CAPITALISED.split(text)  # plain, word, plain, word, ..., plain
    parts[1::2] = map(_encode_word.__getitem__, parts[1::2])
    encoded = "".join(parts)
    if form == BEFORE_SPACE:  # no raw operator follows a space: ESC would stand between them
        return encoded.replace(" " + TITLE, TITLE + " ").replace(" " + ALLCAPS, ALLCAPS + " ")
    return encoded


@_Table
def _encode_word(word: str) -> str:
    """`word`: ASCII letters of which the first is a capital."""
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), word[1:])


def decode(text: str, form: str = NAME) -> str:
    """The original of a CaseOps string. Raises CaseOpsError where an operator is dangling, doubled or misplaced."""
    if text.isascii():
        return text
    parts = _CASED.split(_checked(text, form))
    parts[1::2] = map(_decode_cased.__getitem__, parts[1::2])
    return "".join(parts)


@_Table
def _decode_cased(part: str) -> str:
    return part[1] if part[0] == ESC else part[1:].replace(CAPNEXT, "").upper()


def _checked(text: str, form: str) -> str:
    """Well-formed text with its operators behind the spaces, whichever form it has; CaseOpsError otherwise."""
    if form == BEHIND_SPACE:
        _check(text)
        return text
    behind = _BEFORE_SPACE.sub(lambda match: " " + match[1] if match[1] else match[0], text)
    try:
        _check(behind)
    except CaseOpsError as error:  # an operator has moved by one place, or not at all
        moved = text[error.position] != behind[error.position]
        raise CaseOpsError(error.message, error.position - moved) from None
    return behind


def piece_bytes(surfaces: Sequence[str], form: str = NAME) -> list[int]:
    """UTF-8 bytes of the original text for each SentencePiece surface of an encoded text, in order.

    Operators and ESC count 0, the character behind ESC its 3 bytes, every other character its UTF-8 length (a letter
    has the same in either case), so the sum is the length of the decoded text. A piece boundary may lie behind ESC.
    Raises CaseOpsError on malformed text.
    """
    text = "".join(surfaces)
    if text.isascii():
        return [*map(len, surfaces)]
    _checked(text, form)
    if ESC in text:  # the character behind ESC becomes one that counts, ESC itself one that does not
        text = _ESCAPED.sub(TITLE + "\ue000", text)
        surfaces = [text[start:end] for start, end in pairwise(accumulate(map(len, surfaces), initial=0))]
    try:
        return [*map(_surface_bytes.__getitem__, surfaces)]
    except UnicodeEncodeError:
        position = re.search("[\ud800-\udfff]", text).start()  # type: ignore[union-attr]
        raise CaseOpsError("a lone surrogate has no UTF-8 form", position) from None


@_Table
def _surface_bytes(surface: str) -> int:
    """Bytes of a surface in which every operator counts 0."""
    return len(surface.encode()) - 3 * len(_OPERATOR.findall(surface))


def _check(text: str) -> None:
    plain = _ESCAPED.sub("\ue000\ue000", text) if ESC in text else text  # same length: positions stay
    if not (bad := _MALFORMED.search(plain)):
        return
    at, operator = bad.start(), bad[0]
    name = ("TITLE", "ALLCAPS", "CAPNEXT", "ESC")[OPERATORS.index(operator)]
    if operator == ESC:
        fault = "is not followed by an operator to escape"
    elif plain[at + 1 : at + 2] in OPERATORS[:3] and at + 1 < len(plain):
        fault = "is followed by another operator"
    elif operator != CAPNEXT and re.match("[A-Za-z]", plain[at - 1 : at]):
        fault = "stands inside a word"
    else:
        fault = "is not followed by an ASCII letter"
    raise CaseOpsError(f"{name} {fault}", at)
