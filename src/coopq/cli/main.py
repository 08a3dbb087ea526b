"""The command line: one function for each command; the work is done elsewhere."""

import importlib
import sys
from typing import Any

import click

from coopq.cli.terminal import fail, show_log
from coopq.core.errors import CoopQError, hint, is_out_of_memory

_COMMANDS = {
    "quantize": ("coopq.cli.commands", "Choose the widths for a size, and save the model for an engine."),
    "estimate": ("coopq.cli.commands", "Measure the paper's permutation walks."),
    "front": ("coopq.cli.commands", "Show file sizes against losses, from the losses recorded in a run folder."),
    "allocate": ("coopq.cli.commands", "Solve the paper's program for budgets of a finished estimation."),
    "apply": ("coopq.cli.commands", "Quantize the model of a plan and save it."),
    "export": ("coopq.cli.commands", "Write a saved model as the file of an engine."),
    "show": ("coopq.cli.commands", "Show a run, a plan or a saved model."),
    "doctor": ("coopq.cli.about_commands", "Say which extras and engines work here, and what a model needs."),
    "methods": ("coopq.cli.about_commands", "List the methods, what each is for and what it costs."),
    "targets": ("coopq.cli.about_commands", "List the engines and forms that models are exported to."),
    "compare": ("coopq.cli.judge_commands", "Compare methods at several budgets, judged on WikiText-2."),
    "bench": ("coopq.cli.judge_commands", "Compare methods over models, backends, budgets and seeds."),
    "evaluate": ("coopq.cli.judge_commands", "Measure KL divergence and perplexity, or accuracy at tasks."),
}
"""Module and summary of each command; a module is imported when its command is used, so that help is quick."""


class _Commands(click.Group):
    """The commands of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command, imported now."""
        if cmd_name not in _COMMANDS:
            ctx.fail(f"command {cmd_name!r} is unknown; {hint(cmd_name, _COMMANDS)}")
        command: click.Command = getattr(importlib.import_module(_COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.command(cls=_Commands, no_args_is_help=True, context_settings={"max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="coopq", message="%(prog)s %(version)s")
def app(debug: bool) -> None:
    """Which bits go where: mixed-precision quantization of language models by a cooperative game.

    \b
      coopq quantize Qwen/Qwen3-4B --for llama.cpp --size 2.2GB --out qwen3.gguf
    """
    show_log()


def main() -> None:
    """Entry point: a user's error is one line and exit code 2; tracebacks appear with --debug alone."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:  # accepted anywhere, and handed on before the command
        arguments = ["--debug", *(word for word in arguments if word != "--debug")]
    try:
        code: Any = app.main(arguments, prog_name="coopq", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        fail(_one_line(error), debug)
    except click.Abort:
        sys.exit(130)  # what shells expect after Ctrl-C
    except CoopQError as error:
        fail(str(error), debug)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        way_out = "end other programs on the device, or use --device cpu, and run the same command again"
        fail(f"the device ran out of memory; {way_out}: nothing computed is lost", debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = " ".join(str(error.strerror or error).split())
        fail(f"{place}{reason}; solve it and run the same command again: nothing computed is lost", debug)


def _one_line(error: click.ClickException) -> str:
    """What click says, in one line, with the way out."""
    if isinstance(error, click.NoSuchOption):
        options = [one for one in error.ctx.command.params if isinstance(one, click.Option)] if error.ctx else []
        known = [name for option in options for name in (*option.opts, *option.secondary_opts)]
        advice = hint(error.option_name, known)
        where = error.ctx.command_path if error.ctx else "coopq"
        lists_all = f"`{where} --help` lists all"
        return f"option {error.option_name} is unknown; {advice if advice.startswith('did') else lists_all}"
    message = " ".join(error.format_message().split())
    if "did you mean" in message or "choose from" in message:
        return message
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "coopq"
    return f"{message.rstrip('.')}; `{where} --help` lists what there is"


if __name__ == "__main__":
    main()
