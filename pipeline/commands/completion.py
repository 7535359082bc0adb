"""`completion`: a script for bash, which asks this command how a word may end.

Not Hydra's own: that one knows no commands, and only the settings that YAML names.
"""

from collections.abc import Iterator

from pipeline.commands.cli import COMMANDS
from pipeline.commands.parser import Parser
from pipeline.config import compose as config
from pipeline.config.show import dotted
from pipeline.printing import say

SCRIPT = r"""_chatmill() {
  local program="${COMP_WORDS[0]}" line="${COMP_LINE:0:COMP_POINT}" current="${COMP_WORDS[COMP_CWORD]}"
  if [[ "$program" == *python* ]]; then
    [[ "${COMP_WORDS[1]}" == *flows.py && $COMP_CWORD -gt 1 ]] || return
    program="$program ${COMP_WORDS[1]}"
  fi
  local word="${line##* }"
  [[ "$current" == "=" ]] && current=""  # for bash, a word ends at each =
  mapfile -t COMPREPLY < <($program completion "$word" 2>/dev/null)
  COMPREPLY=("${COMPREPLY[@]#"${word%"$current"}"}")
}
complete -o nospace -o default -F _chatmill chatmill python python3"""


def completion(arguments: list[str]) -> int:
    if not arguments or set(arguments) & {"-h", "--help"}:
        Parser("completion").parse(arguments)
        say(SCRIPT)
    for word in arguments[-1:]:
        for candidate in sorted(set(_candidates(word))):
            say(candidate)
    return 0


def _candidates(word: str) -> Iterator[str]:
    """Words that begin like this one: commands, files of a group, and names of settings up to their next dot."""
    name, given, _ = word.partition("=")
    groups = [path.name for path in config.CONF.iterdir() if path.is_dir() and path.name != "stage"]
    if given:
        files = (config.CONF / name).glob("*.yaml") if name in groups else ()
        words = [f"{name}={path.stem}" for path in files]
    else:
        settings = [f"{setting}=" for setting in dotted(config.compose([]), "")]
        words = [f"{command} " for command in COMMANDS] + [f"{group}=" for group in groups] + settings
    for candidate in words:
        if candidate.startswith(word):
            dot = candidate.find(".", len(word))
            yield candidate[: dot + 1] if dot >= 0 and not given else candidate
