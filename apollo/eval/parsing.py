r"""Which option a written answer chooses, for scoring "generate".

Here because parsers make scores: peers guess at random, take the first letter of "A cat sits there"
for option A, or drop what they cannot read. This one never guesses. Each rule finds a set of
options; the first that finds any decides; one option is an answer, several are ambiguous, and both
ambiguous and unparsable count as wrong and are shown. In order:

1. Thinking (`<think>...</think>`), markdown and full-width forms are removed.
2. The whole text is an option's text, case, punctuation and articles aside.
3. A statement: `\boxed{C}`, `<answer>B</answer>`, "the answer is (C)", "so D", "no, B"
   (`STATEMENTS`). The last one counts, since reasoning comes before the conclusion.
4. A line that is a letter or an option's text only.
5. A line that begins with a letter, "B) the red ball"; a first line that begins with the sentence
   "Red." or with yes or no.
6. Letters, else option texts, that are named anywhere in what a statement says, then anywhere at
   all; "not A" and "A is wrong" do not name A, and "dark red" does not name "red".

A capital A before a word is the article. A letter next to the text of another option is both, thus
ambiguous. Next: `scoring.py`; the table of cases in tests/test_parsing.py.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Parsed:
    """The option that a text chooses.

    Attributes:
        prediction: Its index, or None.
        status: "ok", or "empty" (nothing was written), "ambiguous" (several options are chosen),
            "unparsable" (none is, or a letter that no option has).
    """

    prediction: int | None
    status: str


def parse_answer(text: str, options: Sequence[str]) -> Parsed:
    """Find the option that `text` chooses; the module's docstring has the rules.

    Args:
        text: What a model wrote.
        options: Texts of the options, without letters, in the order shown as A, B, C...
    """
    if not text.strip():
        return Parsed(None, "empty")
    text, reader = clean(text), _Reader([clean(option) for option in options])
    rules = (reader.whole, reader.stated, reader.lone_line, reader.head_of_line, reader.named)
    found = next((found for rule in rules if (found := rule(text)) is not None), None)
    if not found:
        return Parsed(None, "unparsable")
    return Parsed(found.pop(), "ok") if len(found) == 1 else Parsed(None, "ambiguous")


# ---- the text

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_MARKUP = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf)(?=\{)|\\[()\[\]]|<\|[^|>]*\|>|</?s>"
    r"|^#+ |(?<!\w)_+|_+(?!\w)",
    re.MULTILINE,
)


def clean(text: str) -> str:
    """Plain characters without thinking, underlining, headings, LaTeX fonts, special tokens."""
    text = _THINKING.sub(" ", unicodedata.normalize("NFKC", text).replace("’", "'"))
    for tag in ("think", "thinking", "reasoning"):  # one opened by the prompt, or cut off
        text = text.rpartition(f"</{tag}>")[2].partition(f"<{tag}>")[0]
    return _MARKUP.sub("", text).strip()


class Token(NamedTuple):
    """A word, number or mark of a text; `letter` is A, B... where it stands for an option."""

    word: str
    letter: str


_AFTER_LETTER = "[A-Z]|is|was|because|since|as|and|or|but|would|seems|appears|matches|instead"
_NO_SPACES = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # kana, Han, Hangul: a word each
_TOKEN = re.compile(
    rf"""
    (?P<letter>
      (?<! [A-Za-z0-9À-ɏ°] ) (?<! \w' ) (?<! [A-Z]\. )         # not of "it's", "20 °C", "D.C."
      (?: [B-HJ-Z]
        | [AI] (?! [ ]+ (?! (?: {_AFTER_LETTER} ) \b ) \w )     # "A cat" has the article
        | (?: (?<= ption[ ] ) | (?<= hoice[ ] ) ) [A-Za-z]
        | (?: ^ | (?<= [(\[{{"'] ) ) [a-z] (?= ["']? (?: [)\]}}.:] | $ ) )
      )
      (?! [A-Za-z0-9À-ɏ+#] | ['-]\w | \.[A-Z] )               # not of "C++", "T-shirt"
    )
    | (?<! \w ) -? \d+ (?: [.:,/]\d+ )*                         # a number or a time is one word
    | [{_NO_SPACES}]
    | (?: (?! [{_NO_SPACES}] ) \w )+ (?: '\w+ )*
    | [.,;:!?/&\n。、]
    """,
    re.VERBOSE | re.MULTILINE,
)
_MARKS = frozenset(".,;:!?/&\n。、")
_SENTENCE_ENDS = frozenset(".;:!?\n。")
_ARTICLES = frozenset(("a", "an", "the"))


def tokens_of(text: str) -> list[Token]:
    """Cut a cleaned text; words are in lower case, without apostrophes, and no articles."""
    tokens = []
    for match in _TOKEN.finditer(text):
        letter = (match["letter"] or "").upper()
        word = match[0].casefold().replace("'", "")
        if letter or word not in _ARTICLES:
            tokens.append(Token(word, letter))
    return tokens


# ---- the rules

_ANSWER = "answer|antwort|réponse|respuesta|risposta|resposta|ответ"
STATEMENTS: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "boxed": r"\\boxed\s*\{",
        "tag": r"<answer>",
        "answer": rf"(?<![</])\b(?:{_ANSWER})\b[^.:=\n]{{0,60}}?"
        r"(?:\b(?:is|be|ist|lautet|est|es|è|é)\b|[:=]|->|→)",
        "answer in another script": r"(?:答案|答え|正解|정답)[是为為は은는]*|[选選][择擇]?",
        "choice": r"\b(?:correct|right|best|final|my) (?:option|choice)(?: is\b|:)",
        "choose": r"\b(?:I|we)(?:'d|'ll| would| will)? (?:choose|pick|select|go with|say)\b",
        "is right": r"(?<![\w'])(?=\(?[A-Z]\)? (?:is|must be) (?:the )?(?:most )?"
        r"(?:correct|right|best|answer|appropriate|accurate)\b)",
        "conclusion": r"\b(?:so|therefore|thus|hence)\b",
        "correction": r"[.,;!?-]\s*(?:no|wait|actually|sorry|i mean|correction)\b",
    }.items()
}
"""What stands before the answer that a text gives in the end."""
MAX_STATEMENTS = 50  # looked at, the last ones: a model caught in a loop writes a thousand
_HINTS = ("conclusion", "correction")  # count only if the answer follows at once
_SAID = re.compile(r"[\s,:]{0,20}([^\n<}]{0,300})")  # after it: the rest of its line, or the next
_FILLERS = frozenset(
    "option choice letter answer is it its be that clearly definitely probably likely , :".split()
)
_JOINERS = frozenset((",", "/", "&", "and", "or"))
_POLAR = re.compile(r"(yes|no|true|false)\s*(?:[,.;:!-]|$)", re.IGNORECASE)
_NOT_BEFORE = re.compile(
    r"\b(?:not|never|neither|nor|without|than|instead of|cannot|rul\w+ out|exclud\w+|eliminat\w+"
    r"|(?:is|are|was|were|does|did|do|ca|could|would|should|wo|has|have|had)nt)\b|\bno$"
)
_NOT_AFTER = re.compile(
    r"(?:(?:is|are|was|were|seems|looks|can|must|would|be) )*"
    r"(?:(?:not|isnt|arent|cannot be|cant be) (?:correct|right|answer|true|supported|possible|best)"
    r"|wrong|incorrect|false|ruled out|eliminated|excluded|unlikely|impossible)\b"
)
_REFUSAL = re.compile(
    r"\b(?:cannot|can't|can not|could not|couldn't|unable to|not able to|(?:im|not )possible to) "
    r"(?:\w+ )?(?:determine|tell|answer|see|identify|provide|assist|help|say|know|view|watch|access"
    r"|confirm|choose)",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[.;!?](?=\s)|\n|\bbut\b")


class _Reader:
    """The rules, for the options of one question: each gives a set of options, or None.

    The empty set is a letter that no option has, where an answer must stand.
    """

    def __init__(self, options: list[str]) -> None:
        self.options = [_literal(option) for option in options]
        words = [[t.word for t in tokens_of(option) if t.word not in _MARKS] for option in options]
        # "C++" and "C#" are the same word: such options are known by their literal text only, and
        # one that is a single letter by that letter.
        self.words = [
            [] if words.count(one) > 1 or _is_letter(option) else one
            for one, option in zip(words, self.options, strict=True)
        ]
        self.polar: dict[str, set[int]] = {}
        for index, option in enumerate(options):
            if match := _POLAR.match(option):
                self.polar.setdefault(match[1].lower(), set()).add(index)
        self.may_refuse = not any(_REFUSAL.search(option) for option in options)

    # rules, in order

    def whole(self, text: str) -> set[int] | None:
        """The option whose text, or letter, is all that was written."""
        found = self.by_literal(_literal(text))
        tokens = [token for token in tokens_of(text) if token.word not in _MARKS]
        if len(tokens) == 1 and tokens[0].letter:
            return found | self.by_letter(tokens[0].letter)
        words = [token.word for token in tokens]
        return found or {i for i, one in enumerate(self.words) if one and one == words} or None

    def stated(self, text: str) -> set[int] | None:
        """What the last statement says that names an option at once."""
        for _, said in _statements(text):
            if (found := self.head(said)) is not None:
                return found
        return None

    def lone_line(self, text: str) -> set[int] | None:
        """The options that have a line for themselves."""
        return set().union(*(self.whole(line) or () for line in text.split("\n"))) or None

    def head_of_line(self, text: str) -> set[int] | None:
        """The letters with which lines begin, and what the first line begins with."""
        first, *others = text.split("\n")
        found = self.head(first) or set()
        for line in others:
            tokens = tokens_of(line)
            if tokens and tokens[0].letter:
                found = found | (self.head(line) or set())
        return found or None

    def named(self, text: str) -> set[int] | None:
        """The options named in what a statement says, the last first, else in the whole text."""
        strong = [said for name, said in _statements(text) if name not in _HINTS]
        for said in [*strong, text]:
            if found := self.mentions(said):
                return found
        return None

    # what they are made of

    def by_literal(self, literal: str) -> set[int]:
        """The options that read just so."""
        return {index for index, option in enumerate(self.options) if option == literal}

    def by_letter(self, letter: str) -> set[int]:
        """The option with this letter, and one whose text is this letter."""
        index = ord(letter) - ord("A")
        named = {index} if index < len(self.options) else set()
        return named | self.by_literal(letter.lower())

    def head(self, said: str) -> set[int] | None:
        """What a text names with its first words."""
        literal = _literal(said)
        if literal in self.options and not _is_letter(literal):
            return self.by_literal(literal)
        tokens = tokens_of(said)
        for start, token in enumerate(tokens):
            found, end = self.text_at(tokens, start)
            if found and _ends_sentence(tokens, end):
                return found
            letters, end = self.letters_at(tokens, start)
            if end > start:
                denied = _is_denied(tokens, start, end)
                return None if denied else self.with_text(tokens, letters, end)
            if start == 0 and token.word in self.polar:
                return self.polar[token.word]
            if token.word not in _FILLERS:
                return None
        return None

    def with_text(self, tokens: list[Token], letters: set[int], end: int) -> set[int]:
        """Compare letters with the text after them, if that is an option's, or another letter."""
        place = end
        while place < len(tokens) and tokens[place].word in _MARKS:
            place += 1
        if place == len(tokens):
            return letters
        texts, text_end = self.text_at(tokens, place)
        if letter := tokens[place].letter:  # "(A) B", where "B" may be the text of A
            texts = self.by_literal(letter.lower())
            if not texts and (place == end or tokens[end].word == ":"):
                texts = self.by_letter(letter)
        elif not _ends_sentence(tokens, text_end):
            return letters
        return texts if texts and texts <= letters else letters | texts

    def text_at(self, tokens: list[Token], start: int) -> tuple[set[int], int]:
        """The option with the longest text that stands there, and where it ends."""
        best: tuple[set[int], int] = set(), start
        for index, words in enumerate(self.words):
            place, num_matched = start, 0
            while num_matched < len(words) and place < len(tokens):
                if tokens[place].word == words[num_matched]:
                    num_matched += 1
                elif not num_matched or tokens[place].word not in _MARKS:
                    break
                place += 1
            if words and num_matched == len(words) and place > best[1]:
                best = {index}, place
        return best

    def letters_at(self, tokens: list[Token], start: int) -> tuple[set[int], int]:
        """The options whose letters are there ("B", "A and B", "Option 2"), and where they end."""
        found, end = self.letter_at(tokens, start)
        place = end
        while place > start:
            while place < len(tokens) and tokens[place].word in _JOINERS:
                place += 1
            if place == end or place == len(tokens):
                break
            more, place = self.letter_at(tokens, place)
            if not more:
                break
            found, end = found | more, place
        return found, end

    def letter_at(self, tokens: list[Token], start: int) -> tuple[set[int], int]:
        """The same for a single letter or number."""
        if tokens[start].letter:
            return self.by_letter(tokens[start].letter), start + 1
        number = tokens[start + 1].word if start + 1 < len(tokens) else ""
        if tokens[start].word == "option" and re.fullmatch("[1-9][0-9]?", number):
            index = int(number) - 1
            named = {index} if index < len(self.options) else set()
            return named | self.by_literal(number), start + 2
        return set(), start

    def mentions(self, text: str) -> set[int]:
        """Letters, else texts, that are named and not denied, refusals aside."""
        if self.may_refuse:
            text = "\n".join(c for c in _CLAUSE_END.split(text) if not _REFUSAL.search(c))
        tokens, start = tokens_of(text), 0
        letters: set[int] = set()
        texts: set[int] = set()
        while start < len(tokens):
            kind, (found, end) = texts, self.text_at(tokens, start)
            if not found:
                kind, (found, end) = letters, self.letters_at(tokens, start)
                found = self.with_text(tokens, found, end) if found else found
            if found and not _is_denied(tokens, start, end):
                kind |= found
            start = max(end, start + 1)
        return letters or texts


def _statements(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, what it says) of the last statements, the last first."""
    ends = [
        (match.end(), name)
        for name, pattern in STATEMENTS.items()
        for match in pattern.finditer(text)
    ]
    for end, name in sorted(ends)[: -MAX_STATEMENTS - 1 : -1]:
        said = _SAID.match(text, end)
        assert said is not None  # the pattern matches nothing at all, too
        yield name, said[1]


def _ends_sentence(tokens: list[Token], end: int) -> bool:
    return end == len(tokens) or tokens[end].word in _SENTENCE_ENDS


def _is_denied(tokens: list[Token], start: int, end: int) -> bool:
    """Whether up to four words before, or those after, say that it is not so."""
    before = _words_until_mark(reversed(tokens[max(0, start - 4) : start]))
    after = _words_until_mark(tokens[end : end + 6])
    return bool(_NOT_BEFORE.search(" ".join(before[::-1])) or _NOT_AFTER.match(" ".join(after)))


def _words_until_mark(tokens: Iterable[Token]) -> list[str]:
    """The words up to a mark or "but"."""
    words = (token.word for token in tokens)
    return list(takewhile(lambda word: word not in _MARKS and word != "but", words))


def _literal(text: str) -> str:
    """Without case, and what may surround a whole answer."""
    return text.casefold().strip(" \n.\"'*`")


def _is_letter(text: str) -> bool:
    return len(text) == 1 and "a" <= text <= "z"
