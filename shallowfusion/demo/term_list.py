"""The medical words whose recall the demo counts: `python -m shallowfusion.demo.term_list --data DIRECTORY`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from shallowfusion.demo.corpus import GENERAL_SOURCES, MEDICAL_SOURCES, read_sentences
from shallowfusion.demo.shipped import HERE

__all__ = ["main", "medical_terms"]

FEWEST_OCCURRENCES = 5
SHORTEST = 6


def medical_terms(data: Path) -> list[str]:
    """Words of six letters or more, five times or more in the medical training texts and never in the general ones.

    The list comes from training texts alone, so it is fixed before anything is decoded.
    """
    counts = Counter(
        word for sentence in read_sentences(data, MEDICAL_SOURCES, False) for word in sentence.text.split()
    )
    general = {word for sentence in read_sentences(data, GENERAL_SOURCES, False) for word in sentence.text.split()}
    frequent = (word for word, count in counts.items() if count >= FEWEST_OCCURRENCES and len(word) >= SHORTEST)
    return sorted(word for word in frequent if word not in general and "'" not in word)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the list of medical words the demo counts.")
    parser.add_argument("--data", type=Path, required=True, help="directory with text/")
    parser.add_argument("--out", type=Path, default=HERE / "terms.txt")
    chosen = parser.parse_args(arguments)
    found = medical_terms(chosen.data)
    chosen.out.write_text("\n".join(found) + "\n", encoding="utf-8")
    print(f"{len(found)} terms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
