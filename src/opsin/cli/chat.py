"""``opsin chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from opsin.cli import pictures
from opsin.cli.flags import add_engine_flags, add_model_place, engine_settings
from opsin.cli.session import Session, add_sampling_flags, print_piece, sampling_params
from opsin.errors import MediaError, RequestError, RequestFailedError
from opsin.params import SamplingParams

if TYPE_CHECKING:
    from opsin.cli.flags import Commands

HELP = """\
  /image PATH   show a picture (a path or URL) with your next message; or paste paths into the message itself
  /clear        forget the conversation
  /help         this list
  /exit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat",
        usage="opsin chat [options] [MODEL]",
        help="talk with a model in the terminal",
        description="Talk with a model in the terminal.",
        epilog=f"in the conversation:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_place(parser)
    parser.add_argument("--system", metavar="TEXT", default=argparse.SUPPRESS, help="A system message to begin with.")
    parser.add_argument("-q", "--quiet", action="store_true", help="No memory plan and no speed after each answer.")
    add_sampling_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(function=execute, parser=parser)


def execute(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has line editing and history

    with Session(engine_settings(args)) as session:
        conversation = Conversation(session, params, system=getattr(args, "system", None), quiet=args.quiet)
        print(HELP)
        while True:
            try:
                line = input("\n> ")
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            if line.strip() in ("/exit", "/quit"):
                return 0
            conversation.handle(line)


class Conversation:
    """The messages so far, and the pictures that wait for the next one."""

    def __init__(self, session: Session, params: SamplingParams, *, system: str | None, quiet: bool) -> None:
        self._session = session
        self._params = params
        self._quiet = quiet
        self._opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)
        self._waiting: list[str] = []

    def handle(self, line: str) -> None:
        """Act on one typed line; errors of one message are printed and leave the conversation as it was."""
        command, _, rest = line.strip().partition(" ")
        if command == "/clear":
            self.messages = list(self._opening)
            self._waiting.clear()
            print("(forgotten)")
        elif command == "/help":
            print(HELP)
        elif command == "/image":
            self._add_pictures(rest.strip())
        elif command.startswith("/") and not pictures.is_file(command) and not pictures.split_line(line)[0]:
            print(f"There is no {command}.\n{HELP}")
        else:
            sources, text = pictures.split_line(line)
            if not text:
                self._waiting += sources
                self._show_waiting()
            else:
                self._say(self._waiting + sources, text)

    def _add_pictures(self, named: str) -> None:
        sources = pictures.split_line(named)[0] or [named.strip("'\"")]
        for source in sources:
            if not pictures.is_url(source) and not pictures.is_file(source):
                print(f"There is no picture {source!r}.")
                return
        self._waiting += sources
        self._show_waiting()

    def _show_waiting(self) -> None:
        if self._waiting:
            count = len(self._waiting)
            print(f"({count} picture{'s' * (count > 1)} will go with your next message)")

    def _say(self, sources: list[str], text: str) -> None:
        try:
            turn = pictures.user_message(sources, text)
            with pictures.named(sources, len(self.messages)):
                said = self._answer_to([*self.messages, turn])
        except (RequestError, RequestFailedError) as error:
            print(f"error: {error}", file=sys.stderr)
            if isinstance(error, MediaError):
                self._waiting.clear()
            return
        if said:
            self._waiting.clear()
            self.messages += [turn, {"role": "assistant", "content": said}]

    def _answer_to(self, messages: list[dict[str, Any]]) -> str:
        """Stream the answer; returns what was said until it ended or Ctrl-C stopped it."""
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print_piece(piece)

        try:
            answer = self._session.ask(messages, self._params, show)
        except KeyboardInterrupt:
            print(" (stopped)")
        else:
            print()
            if not self._quiet:
                print(f"[{answer.summary()}]", file=sys.stderr)
        return "".join(pieces)
