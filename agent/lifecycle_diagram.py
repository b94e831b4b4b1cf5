"""The lifecycle's table as a Mermaid state diagram: python -m agent.lifecycle_diagram [FILE]

With FILE, what lies between `<!-- diagram -->` and `<!-- /diagram -->` in it is replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

from agent.lifecycle import TABLE, Event
from edgeward.wire.reports import Phase

BEGIN, END = "<!-- diagram -->", "<!-- /diagram -->"


def diagram() -> str:
    """One arrow per pair of phases, labelled with its events; new wishes, possible anywhere, are left out."""
    arrows: dict[tuple[Phase, Phase], list[Event]] = {}
    for (phase, event), after in TABLE.items():
        if event is not Event.WISHED:
            arrows.setdefault((phase, after), []).append(event)
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.PENDING}: {Event.WISHED}"]
    lines += [
        f"    {before} --> {after}: {', '.join(sorted(events))}" for (before, after), events in arrows.items()
    ]
    return "\n".join(["```mermaid", *lines, "```"])


def placed(text: str) -> str:
    """`text` with the diagram in its place. Raises ValueError when there is none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{diagram()}\n\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(diagram())
    else:
        file = Path(sys.argv[1])
        file.write_text(placed(file.read_text()))
