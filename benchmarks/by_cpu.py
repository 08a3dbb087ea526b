"""Reports with a section for each processor they were measured on."""

import platform
from datetime import date
from pathlib import Path


def processor() -> str:
    """What the system calls it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def write_section(report: Path, head: list[str], section: list[str]) -> None:
    """Write the report anew, with this section in the place of an earlier one of the same processor.

    Args:
        report: The Markdown file.
        head: What stands above all sections.
        section: What was measured, without its heading.
    """
    text = report.read_text() if report.exists() else ""
    others = [part for part in text.split("\n## ")[1:] if not part.startswith(f"{processor()}, ")]
    ours = "\n".join([f"{processor()}, {date.today().isoformat()}", "", *section]) + "\n"
    report.write_text("\n## ".join(["\n".join(head) + "\n", *sorted([*others, ours])]))
