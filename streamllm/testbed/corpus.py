"""The text of the embedded testbed: documentation that every CPython installation carries.

`evaluation_text` is what we ship (`text.txt`); `training_documents` is what the checkpoint was trained on. No
paragraph of the second shares eight consecutive words with the first: perplexity on the text is a held-out one. The
documents differ a little between Python releases; the shipped files were made with CPython 3.11.7.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EVALUATION_TOPICS = ("types", "formatstrings")
"""pydoc topics (chapters of the Python reference) that share no wording with any other topic or docstring."""

OVERLAP_WORDS = 8
_SKIPPED_FOLDERS = {"site-packages", "pydoc_data", "__pycache__", "ensurepip"}
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){3,}", re.MULTILINE)


def evaluation_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in EVALUATION_TOPICS) + "\n"


def training_documents(held_out: str) -> list[str]:
    """Every other topic, long docstring and comment block of the standard library: each paragraph once, none that
    shares `OVERLAP_WORDS` consecutive words with `held_out`."""
    forbidden = word_ngrams(held_out)
    seen: set[str] = set()
    documents = []
    for document in _documents():
        fresh = []
        for paragraph in re.split(r"\n\s*\n", document.expandtabs(4)):
            identity = " ".join(paragraph.split())
            if identity and identity not in seen and not word_ngrams(paragraph) & forbidden:
                fresh.append(paragraph.rstrip())
            seen.add(identity)
        text = "\n\n".join(fresh).strip()
        if len(text) >= 100:
            documents.append(text)
    return documents


def word_ngrams(text: str, length: int = OVERLAP_WORDS) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if name not in EVALUATION_TOPICS:
            yield topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            yield from _documents_of(path)


def _documents_of(path: Path) -> Iterator[str]:
    """The docstrings of one source file as one document, its comment blocks as another."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):  # the library's own deliberately broken test files
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    yield "\n\n".join(text for text in docstrings if text and len(text) >= 100)
    blocks = (re.sub(r"(?m)^[ \t]*#+ ?", "", block) for block in _COMMENT_BLOCK.findall(source))
    yield "\n\n".join(block for block in blocks if len(block) >= 100 and _is_prose(block))


def _is_prose(block: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in block)
    return letters >= 0.7 * len(block)
