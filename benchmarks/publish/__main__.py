"""Write the pages' blocks from the results, or with ``--check`` only say which differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.publish.pages import ROOT, pages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks publish", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; the exit status is 1 where a page differs")
    options = parser.parse_args(arguments)
    differing = [
        (page, text) for page, text in pages().items() if not page.exists() or page.read_text(encoding="utf-8") != text
    ]
    for page, text in differing:
        if not options.check:
            page.write_text(text, encoding="utf-8")
        print(f"{'differs' if options.check else 'written'}: {page.relative_to(ROOT)}")
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
