"""What keeps a thought, or a query, out: length, banned words, near duplicates."""

import hashlib
import re

from datasketch import MinHash, MinHashLSH

from r4b_jax.config import CurationConfig

SHINGLE = 3  # words side by side: the order of words counts
PERMUTATIONS = 128
# The index finds what is about so alike, and everything found is then compared exactly: at this
# share of the similarity wanted it misses less than one in a thousand.
INDEX_SHARE = 0.8

_CJK = "\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces: a character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def num_words(text: str) -> int:
    """How many words a text has, as a person would count."""
    return len(re.findall(rf"[{_CJK}]|[^\s{_CJK}]+", text))


def refusal(config: CurationConfig, thought: str | None) -> tuple[str, str] | None:
    """(The filter that refuses a thought, what it found), or None if all let it pass."""
    words = num_words(thought or "")
    if words == 0:
        return "empty", ""
    if any("\ud800" <= character <= "\udfff" for character in thought):
        return "not Unicode", "half a character, as JSON can have it"
    if words < config.min_thought_words:
        return "too short", f"{words} words"
    if words > config.max_thought_words:
        return "too long", f"{words} words"
    plain = _plain(thought)
    for phrase in config.banned:
        if re.search(rf"(?<!\w){re.escape(_plain(phrase))}(?!\w)", plain):
            return "banned words", phrase
    return None


def _plain(text: str) -> str:
    return " ".join(text.replace("’", "'").casefold().split())


class Near:
    """Texts seen so far, each about something, and whether a new one is nearly one of them.

    Alike are texts about the same thing, with the same numbers in the same order (the next problem
    of a series is another problem), whose sets of word triples have a Jaccard similarity of
    `similarity` at least; with 1.0, texts of the same words. All is kept in memory: some 7 KB a
    text.
    """

    def __init__(self, similarity: float):
        self.similarity = similarity
        self.exact: dict[bytes, str] = {}
        self.texts: list[tuple[str, str, str]] = []  # (name, about, text), by number in the index
        self.index = None
        if similarity < 1:
            self.index = MinHashLSH(
                threshold=INDEX_SHARE * similarity, num_perm=PERMUTATIONS, weights=(0.1, 0.9)
            )

    def add(self, about: str, text: str, name: str) -> str | None:
        """The name of an earlier text that this one is nearly equal to; if there is none, remember
        this one."""
        words = _words(text)
        key = hashlib.sha1("\0".join([about, *words]).encode(errors="replace")).digest()
        if key in self.exact:
            return self.exact[key]
        if self.index is not None:
            about = "\0".join([about, *_NUMBER.findall(text)])
            mark, shingles = MinHash(PERMUTATIONS), _shingles(words)
            mark.update_batch([f"{about}\0{s}".encode(errors="replace") for s in sorted(shingles)])
            for number in sorted(self.index.query(mark)):
                earlier, of, other = self.texts[number]
                alike = _jaccard(shingles, _shingles(_words(other)))
                if of == about and alike >= self.similarity:
                    return earlier
            self.index.insert(len(self.texts), mark)
            self.texts.append((name, about, text))
        self.exact[key] = name
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _shingles(words: list[str]) -> frozenset[str]:
    last = max(len(words) - SHINGLE, 0)
    return frozenset("\0".join(words[i : i + SHINGLE]) for i in range(last + 1))


def _jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b)
