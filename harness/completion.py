"""Completion of command lines: `harness completion bash|zsh|fish`, and what its scripts ask.

The scripts are thin: they hand over the line up to the cursor and show what comes back, so that every shell
completes the same, and behind `run` and `plan` the settings are Hydra's own answer.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from harness.arguments import parser_for
from harness.errors import EXIT_OK, HarnessError
from harness.store import studies

SHELLS = ("bash", "zsh", "fish")
QUERY = "query"

_BASH = r"""_harness() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n'
    COMPREPLY=($("${COMP_WORDS[0]}" completion query "$line" 2>/dev/null))
    local word=${line##*[[:space:]]}
    # Where '=' breaks words, bash wants what follows it alone.
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/.,] ]]; then
        compopt -o nospace
    fi
}
complete -o default -F _harness harness
"""
_ZSH = r"""#compdef harness
_harness() {
    local -a found
    found=("${(@f)$("${words[1]}" completion query "${BUFFER[1,CURSOR]}" 2>/dev/null)}")
    compadd -Q -S '' -- ${(M)found:#*[=/.,]}
    compadd -Q -- ${found:#*[=/.,]}
}
compdef _harness harness
"""
_FISH = r"""function __harness_complete
    harness completion query (commandline --cut-at-cursor --current-process | string collect)
end
complete --command harness --no-files --arguments '(__harness_complete)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

#: What answers for the settings behind `run` and `plan`: the words that begin like the last one of a line.
Settings = Callable[[str], Sequence[str]]
#: The commands by name; called with `--help` they print theirs.
Commands = Mapping[str, Callable[[list[str]], int]]


def main(argv: Sequence[str], *, commands: Commands, settings: Settings) -> int:
    """`harness completion SHELL`."""
    if list(argv[:1]) == [QUERY]:
        line = " ".join(argv[1:])
        print(*candidates(line, commands=commands, settings=settings), sep="\n")
        return EXIT_OK
    parser = parser_for(
        "completion",
        description="Print what a shell needs to complete commands, settings, presets, studies and trials.",
        examples=(
            'eval "$(harness completion bash)"                       # in ~/.bashrc',
            'eval "$(harness completion zsh)"                        # in ~/.zshrc, behind compinit',
            "harness completion fish > ~/.config/fish/completions/harness.fish",
        ),
    )
    parser.add_argument("shell", choices=SHELLS)
    print(SCRIPTS[parser.parse_args(argv).shell], end="")
    return EXIT_OK


def candidates(line: str, *, commands: Commands, settings: Settings) -> list[str]:
    """The words that the last one of a line, which may be empty, can become.

    Args:
        line: a command line up to the cursor, beginning with the program.
    """
    words = _words(line)
    if len(words) < 2:
        return []
    word, before = words[-1], words[1:-1]
    if not before:
        return _beginning(word, [*commands, "--help", "--version"])
    command, rest = before[0], before[1:]
    if command in ("run", "plan"):
        if word.startswith("-"):
            return _beginning(word, _flags(commands[command]))
        with contextlib.suppress(Exception, SystemExit):
            return _settings(" ".join([*rest, word]), settings)
        return []
    if command not in commands:
        return []
    if word.startswith("-"):
        return _beginning(word, _flags(commands[command]))
    return _beginning(word, _arguments(command, rest))


def _settings(line: str, settings: Settings) -> list[str]:
    """Hydra's words; it knows nothing of the levels before a comma."""
    head, _, word = line.rpartition(" ")
    key, equals, levels = word.partition("=")
    earlier, comma, last = levels.rpartition(",")
    if not comma:
        return list(settings(line))
    prefix = f"{key}{equals}"
    found = settings(f"{head} {prefix}{last}")
    taken = earlier.split(",")
    ends = [entry.removeprefix(prefix) for entry in found if entry.startswith(prefix)]
    return [f"{prefix}{earlier},{end}" for end in ends if end not in taken]


def _arguments(command: str, rest: Sequence[str]) -> list[str]:
    """What can stand at this place of a command."""
    results_dir = _value_of("--results-dir", rest) or "results"
    flag = rest[-1] if rest and rest[-1].startswith("--") else ""
    names = [study.name for study in studies(Path(results_dir))]
    if flag == "--study":
        return names
    if flag == "--baseline":
        return [*names, *(path.stem for path in Path(results_dir, "baselines").glob("*.json"))]
    if command == "list":
        return ["studies", "experiments", "tasks", "families"]
    if command == "completion":
        return list(SHELLS)
    if command == "show":
        return [path.stem for study in studies(Path(results_dir)) for path in study.trials.glob("*.json")]
    if command == "baseline" and not rest:
        return ["save"]
    return names


def _flags(command: Callable[[list[str]], int]) -> list[str]:
    """The long options that the help of a command names."""
    text = io.StringIO()
    with contextlib.suppress(SystemExit, HarnessError), contextlib.redirect_stdout(text):
        command(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text.getvalue())))


def _words(line: str) -> list[str]:
    """The words of a line; an open quote or a space at the end leaves an empty or unfinished last one."""
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    return [*words, ""] if line[-1:].isspace() else words


def _value_of(flag: str, words: Sequence[str]) -> str:
    for index, word in enumerate(words[:-1]):
        if word == flag:
            return words[index + 1]
    return ""


def _beginning(word: str, known: Iterable[str]) -> list[str]:
    return sorted({entry for entry in known if entry.startswith(word)})
