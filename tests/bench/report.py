"""Results on disk: JSON with everything, Markdown with a table; written anew after each step, whole or not at all, so that what was measured survives whatever comes."""
import json
import os
import pathlib
import shlex
import signal
import sys


def end_well():
    """The first SIGINT or SIGTERM is a KeyboardInterrupt: servers are stopped and what was measured is kept. Further ones do not disturb that."""

    def once(*_):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, once)


def write(path, text):
    new = pathlib.Path(f"{path}.new")
    new.write_text(text)
    os.replace(new, path)


def table(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def number(value):
    """Three significant digits or all before the point: 0.0123, 4.56, 78.9, 1234."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def ranged(spread, unit=1):
    return f"{number(spread['median'] * unit)} ({number(spread['min'] * unit)}..{number(spread['max'] * unit)})"


def command_line():
    """As it was called, folders by their last name: where they lie is this machine's affair."""

    def short(word):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return flag + equals + (pathlib.Path(value).name if value.startswith("/") else value)

    return shlex.join(["tests/bench/" + pathlib.Path(sys.argv[0]).name, *map(short, sys.argv[1:])])


class Report:
    """One JSON object and the Markdown beside it, in a folder."""

    def __init__(self, folder, name, machine, render):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.render = render
        self.data = {"machine": machine, "command": command_line(), "complete": False, "results": {}}

    def save(self):
        write(self.folder / f"{self.name}.json", json.dumps(self.data, indent=1) + "\n")
        machine = self.data["machine"]
        head = (f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; kvasir {machine['commit']}; {machine['date']}\n\n"
                f"`{self.data['command']}`{'' if self.data['complete'] else ' (not all of it ran)'}\n\n")
        write(self.folder / f"{self.name}.md", head + self.render(self.data) + "\n")

    def finish(self):
        self.data["complete"] = True
        self.save()
