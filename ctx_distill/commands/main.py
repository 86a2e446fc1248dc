"""`ctx-distill`: the table of commands, and the exit statuses of their results and errors.

Command modules import what they run inside their functions, so that help and usage errors need no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Group, Parameter

from ctx_distill import __version__, signals
from ctx_distill.commands.ablation import ablation
from ctx_distill.commands.check import check
from ctx_distill.commands.clean import clean
from ctx_distill.commands.compare import compare
from ctx_distill.commands.evaluate import evaluate
from ctx_distill.commands.export import export
from ctx_distill.commands.findings import findings
from ctx_distill.commands.manifest import manifest
from ctx_distill.commands.merge import merge
from ctx_distill.commands.page import page
from ctx_distill.commands.phantom import phantom
from ctx_distill.commands.predict import predict
from ctx_distill.commands.prepare import prepare
from ctx_distill.commands.probe import probe
from ctx_distill.commands.serve import serve
from ctx_distill.commands.settings import settings
from ctx_distill.commands.stages import add_stage_commands
from ctx_distill.commands.submit import submit
from ctx_distill.commands.weights import weights
from ctx_distill.errors import InputError

NOTICE = "A research tool, not a medical device."


def build_app() -> App:
    """Return the command-line application with all commands."""
    app = App(
        name="ctx-distill",
        help=f"Chest-CT understanding distilled from chest-X-ray experts. {NOTICE}",
        version=__version__,
        help_format="markdown",
        default_parameter=Parameter(negative=(), consume_multiple=True),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    add_stage_commands(app, Group.create_ordered("Stages"))
    groups = {
        "Settings": (settings,),
        "Data": (phantom, manifest, merge, check, prepare, findings),
        "Use a model": (predict, evaluate, probe, serve, export),
        "Results": (page, compare, ablation, clean),
        "Machines": (submit,),
    }
    for title, commands in groups.items():
        group = Group.create_ordered(title)
        for command in commands:
            app.command(command, group=group)
    weights.group = group
    app.command(weights)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows `ctx-distill`; None takes `sys.argv`.

    Returns:
        The exit status: 0 done; 1 `check` found errors, or `predict` unreadable scans; 2 bad input; 75 stopped by a
        signal, to be resumed by the same command; 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given and not given[0].startswith("-") else ""
    with signals.listening():
        try:
            return int(build_app()(given, exit_on_error=False, print_error=False) or 0)
        except (InputError, CycloptsError) as error:
            print(f"ctx-distill {command}".rstrip() + f": {_message(error)}", file=sys.stderr)
            return 2
        except signals.StopRequested as stop:
            from ctx_distill.runs.run_folder import is_first_process

            if not is_first_process():
                return 0  # only rank zero reports for the job
            print(f"stopped ({stop}); repeat the command to resume", file=sys.stderr)
            return signals.STOPPED
        except KeyboardInterrupt:
            print("interrupted; repeat the command to resume", file=sys.stderr)
            return 130


def _message(error: Exception) -> str:
    """Return the message of an error; on one line, with a hint at `--help`, for a usage error."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return str(error)
    return f"{text if text.endswith('?') else text.rstrip('.') + '.'} See `--help`."


if __name__ == "__main__":
    sys.exit(main())
