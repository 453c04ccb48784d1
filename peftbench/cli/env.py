"""`peftbench env`: versions, devices, caches and extras, for a bug report."""

from __future__ import annotations

import argparse

from peftbench.backbones.hub import explain_missing_hub
from peftbench.records.recording import read_git
from peftbench.utils.console import say
from peftbench.utils.files import dump_json
from peftbench.utils.report_environment import describe_environment


def main(argv: list[str]) -> int:
    """Print the report and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="peftbench env",
        description="Print what a bug report needs to say about this machine. Secrets and the home folder's name are "
        "not shown.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    found = describe_environment(read_git())
    found["folders"]["hub"] = explain_missing_hub() or "can be reached"
    if arguments.json:
        say(dump_json(found, indent=2, ensure_ascii=True))
        return 0
    width = max(len(key) for section in found.values() for key in section)
    for title, section in found.items():
        if section:
            say(f"{title}:")
            for key, value in section.items():
                say(f"  {key:<{width}}  {value}")
    return 0
