"""`kdtune completion`: prints a script that completes commands, recipes and configs in bash or zsh."""

import argparse

from kdtune import _assets

_COMMANDS = ("ls", "cp", "cat", "validate", "data", "plan", "run", "cache", "download", "migrate", "completion")

_BASH = """\
# bash: eval "$(kdtune completion bash)"
_kdtune() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" kind
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "@COMMANDS@" -- "$current"))
        return
    fi
    case "${COMP_WORDS[1]}:$previous" in
        run:--config|validate:validate|data:data|plan:plan) kind=configs ;;
        run:*|ls:ls) kind=recipes ;;
        cp:cp|cat:cat) kind=all ;;
        completion:completion) COMPREPLY=($(compgen -W "bash zsh" -- "$current")); return ;;
        *) COMPREPLY=($(compgen -f -- "$current")); return ;;
    esac
    COMPREPLY=($(compgen -W "$(kdtune completion $kind)" -- "$current") $(compgen -f -- "$current"))
}
complete -o filenames -F _kdtune kdtune
"""

_ZSH = """\
#compdef kdtune
# zsh: eval "$(kdtune completion zsh)" after compinit
_kdtune() {
    local previous="${words[CURRENT-1]}" kind
    if (( CURRENT == 2 )); then
        compadd -- @COMMANDS@
        return
    fi
    case "${words[2]}:$previous" in
        run:--config|validate:validate|data:data|plan:plan) kind=configs ;;
        run:*|ls:ls) kind=recipes ;;
        cp:cp|cat:cat) kind=all ;;
        completion:completion) compadd -- bash zsh; return ;;
        *) _files; return ;;
    esac
    compadd -- ${(f)"$(kdtune completion $kind)"}
    _files
}
compdef _kdtune kdtune
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `completion` to the command's parsers."""
    parser = subparsers.add_parser("completion", help="print a completion script for bash or zsh", description=__doc__)
    parser.add_argument(
        "shell",
        choices=("bash", "zsh", "recipes", "configs", "all"),
        metavar="SHELL",
        help='bash or zsh: eval "$(kdtune completion bash)"',
    )
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the script, or names one a line."""
    if arguments.shell in ("bash", "zsh"):
        script = _BASH if arguments.shell == "bash" else _ZSH
        print(script.replace("@COMMANDS@", " ".join(_COMMANDS)), end="")
        return
    print("\n".join(names(arguments.shell)))


def names(what: str) -> list[str]:
    """Return the names a shell completes: recipes with their aliases, configs, or both."""
    recipes = [name for recipe in _assets.recipes() for name in (recipe.name, *recipe.aliases)]
    configs = [config.name for config in _assets.configs()]
    return {"recipes": recipes, "configs": configs, "all": [*recipes, *configs]}[what]
