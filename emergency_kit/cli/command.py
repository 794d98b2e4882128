"""Command: how the verbs are built and how each shows its help.

In: functions with typed flags. Out: Typer commands whose help fits terminals from 60 columns on: words stay whole, the verb's own flags
stand before those that nearly every verb has, and an example follows. Imports Typer alone, so that `--help` answers at once.
"""

from __future__ import annotations

import textwrap
from typing import Any, Callable, Sequence, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

PROGRAM = "emergency-kit"
COMPLETE = "_EMERGENCY_KIT_COMPLETE"  # set by a shell that asks what may follow
# Flags that most verbs have and that mean the same in all.
SHARED = {"config", "profile", "set_", "output_dir", "model_name", "overwrite", "debug", "help"}
SETTINGS = {"help_option_names": ["-h", "--help"]}
F = TypeVar("F", bound=Callable[..., None])
_FORMATTER: Any = typer.Context.formatter_class


def fill(text: str, width: int, first: str = "", rest: str = "") -> str:
    """Text in lines of at most `width`, broken at spaces alone: neither `<output-dir>` nor a path is torn."""
    return textwrap.fill(" ".join(text.split()), width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False)


class Formatter(_FORMATTER):
    """Help that is broken at spaces alone. A paragraph that begins with a line of `\\b` keeps its lines."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self.write(fill(f"{prefix or 'Usage: '}{prog} {args}", self.width, rest=" " * 7) + "\n")

    def write_text(self, text: str) -> None:
        indent = " " * self.current_indent
        parts = [part.strip("\n") for part in text.split("\n\n")]
        self.write("\n\n".join(textwrap.indent(part[2:], indent) if part.startswith("\b\n") else fill(part, self.width, indent, indent) for part in parts) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 26, col_spacing: int = 2) -> None:
        column = self.current_indent + col_spacing + min(col_max, max(len(name) for name, _ in rows))
        for name, text in rows:
            first = " " * self.current_indent + name
            if len(first) + col_spacing > column:
                self.write(first + "\n")
                first = ""
            self.write((fill(text, self.width, first.ljust(column), " " * column) or first) + "\n")


class Context(typer.Context):
    """Of a verb's call; its help is Formatter's."""

    formatter_class = Formatter


class Verb(TyperCommand):
    """A verb: its own flags first, then the shared ones."""

    context_class = Context

    def format_options(self, ctx: Any, formatter: Any) -> None:
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        arguments: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            name, text = parameter.get_help_record(ctx) or ("", "")
            if parameter.param_type_name == "argument":
                arguments.append((parameter.metavar or name, text))
            else:
                (shared if parameter.name in SHARED else own).append((name, text))
        for heading, rows in (("Arguments", arguments), ("Options", own), ("Options of every stage" if len(shared) > 2 else "Other options", shared)):
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


class Group(TyperGroup):
    """Several verbs under one name; alone it shows its help."""

    context_class = Context

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, command.short_help or command.help or "") for name, command in self.commands.items()])


class Verbs(typer.Typer):
    """Typer, whose commands are Verbs and whose groups are Groups."""

    def __init__(self, about: str):
        super().__init__(cls=Group, help=about, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=SETTINGS,
                         subcommand_metavar="VERB [ARGS]...")

    def verb(self, name: str | None = None, short: str | None = None, example: str = "", then: str = "") -> Callable[[F], F]:
        """Register a verb. short: its line on the first page; example: a call; then: what to try next."""
        shown = [f"\b\nFor instance:\n  {PROGRAM} {example}"] * bool(example) + [f"\b\nThen:\n  {PROGRAM} {then}"] * bool(then)
        return self.command(name, cls=Verb, short_help=short, epilog="\n\n".join(shown) or None, context_settings=SETTINGS)


app = Verbs("AI Emergency Kit: train, prove and ship an offline assistant for emergencies.")
