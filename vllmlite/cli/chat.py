"""``vllmlite chat``: a conversation in the terminal, or over a pipe with one line per turn."""

from __future__ import annotations

import signal
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

from vllmlite.cli import report, session
from vllmlite.cli.sampling import add_sampling_arguments, given_sampling
from vllmlite.cli.screen import Screen, visible
from vllmlite.config.engine_config import EngineConfig
from vllmlite.config.options import given_options
from vllmlite.errors import ParameterError, VllmliteError
from vllmlite.sampling_params import SamplingParams
from vllmlite.server.parsers.parts import Content, Part
from vllmlite.server.parsers.reasoning import STYLES, ThinkParser
from vllmlite.terminal import is_terminal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator
    from types import FrameType

    from vllmlite.cli.parser import OptionParser
    from vllmlite.server.parsers.reasoning import ThinkStyle

ABOUT = """\
Each turn sends the whole conversation; its earlier turns are in the prefix
cache. Standard input may be a pipe with one turn per line. The model's reasoning
is dim on a terminal, not written to a pipe, and not part of later turns."""

HELP = """\
/help          show this text
/system TEXT   set the system message and start again; without TEXT, show it
/retry         generate the last answer again
/reset         start a new conversation
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer. Any other line is a message to the model. A line that ends
with \\ continues on the next line; // at the beginning stands for a literal /."""

NOT_HERE = {
    "n", "logprobs", "prompt_logprobs", "logprob_token_ids", "detokenize", "truncate_prompt_tokens",
    "truncation_side",
}  # fmt: skip
"""Sampling options that have no use in a conversation."""


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    conversation = parser.add_argument_group("conversation", ABOUT)
    parser.epilog = "commands in the conversation:\n" + "\n".join("  " + line for line in HELP.splitlines())
    conversation.add_argument(
        "--url",
        metavar="URL",
        help="chat with a server that has the OpenAI API; --model is then the server's name of a model",
    )
    conversation.add_argument("--api-key", metavar="KEY", help="for --url; default: $OPENAI_API_KEY")
    conversation.add_argument("--system", "--system-prompt", metavar="TEXT", help="system message")
    conversation.add_argument(
        "-q", "--quick", metavar="MESSAGE", help="send this message, print the answer, and exit"
    )
    conversation.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help="chat template to use instead of the model's: a file, or the name of one",
    )
    conversation.add_argument(
        "--reasoning-parser",
        metavar="NAME",
        choices=STYLES,
        help="separate the model's reasoning from its answer, in the format of: " + ", ".join(STYLES),
    )
    session.add_session_arguments(parser, leave_out={"reasoning_parser"})
    add_sampling_arguments(parser, max_tokens=512, exclude=NOT_HERE)
    output = parser.add_argument_group("output options")
    output.add_argument("--stats", action="store_true", help="print statistics to standard error at the end")


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Chat until the input ends; return 1 if a message from a pipe or ``--quick`` was not answered."""
    session.checked_params(SamplingParams(), given_sampling(args), parser)
    template = session.read_chat_template(args.chat_template, parser)
    answerer = _local(args, template, parser) if args.url is None else _remote(args, template, parser)
    interactive = args.quick is None and is_terminal(sys.stdin)
    with closing(answerer):
        conversation = Conversation(answerer, args.system)
        all_answered = (
            _talk(conversation, interactive) if args.quick is None else conversation.say(args.quick)
        )
    if args.stats and isinstance(answerer, Engine):
        print(report.table(answerer.tally.statistics()), file=sys.stderr)
    return 0 if interactive or all_answered else 1


def _talk(conversation: Conversation, interactive: bool) -> bool:
    """Read and answer turns until the input ends; return whether all were answered.

    On a terminal, Ctrl-C at the prompt discards the typed line."""
    if interactive:
        _edit_lines()
        print("Type a message, or /help for commands.", file=sys.stderr)
    all_answered = True
    while True:
        try:
            turn = _read_turn(interactive)
            text = turn and turn.strip()
            if text is None or text in ("/quit", "/exit"):
                return all_answered
            if text.startswith("/") and not text.startswith("//"):
                all_answered &= conversation.command(text)
            elif text:
                all_answered &= conversation.say(text.removeprefix("/"))
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\nPress Ctrl-D or type /quit to leave.", file=sys.stderr)


def _local(args: argparse.Namespace, template: str | None, parser: OptionParser) -> Engine:
    config = session.engine_config(args, parser)
    if config.skip_tokenizer_init:
        parser.error("a conversation needs a tokenizer: leave out --skip-tokenizer-init")
    started = session.start(config, args.verbose)
    params = session.checked_params(started.engine.default_sampling_params, given_sampling(args), parser)
    if template is None and not started.engine.get_tokenizer().has_chat_template:
        raise ParameterError(
            "model", config.model, "has no chat template: give one with --chat-template, such as chatml"
        )
    style = STYLES[args.reasoning_parser] if args.reasoning_parser is not None else None
    return Engine(started, params, template, style)


def _remote(args: argparse.Namespace, template: str | None, parser: OptionParser) -> Answerer:
    from vllmlite.cli.chat_remote import Server

    local_only = [*(given_options(args, EngineConfig).keys() - {"model"})]
    local_only += [name for name in ("config", "stats", "reasoning_parser") if getattr(args, name)]
    for name in local_only:
        parser.error(
            f"--{name.replace('_', '-')} configures an engine in this process and cannot be used with --url"
        )
    options = given_sampling(args) | ({} if template is None else {"chat_template": template})
    return Server(args.url, getattr(args, "model", None), args.api_key, options)


class Answerer(Protocol):
    """The model side of a conversation: an engine in this process, or a server."""

    def answer(self, messages: list[dict[str, str]]) -> Generator[Part, None, None]:
        """Yield the parts of the answer to ``messages``; closing the generator stops it.

        Raises VllmliteError, and KeyboardInterrupt if Ctrl-C stopped the answer."""
        ...

    def close(self) -> None:
        """Release the resources of the conversation."""
        ...


class Engine:
    """An engine in this process."""

    def __init__(
        self, started: session.Session, params: SamplingParams, template: str | None, style: ThinkStyle | None
    ) -> None:
        """Answer with the engine of ``started``. ``template`` replaces the model's chat template; ``style`` has the
        markers of its reasoning."""
        self.tally = report.Run(started)
        self._engine = started.engine
        self._params = params
        self._template = template
        self._style = style
        self._num_turns = 0

    def answer(self, messages: list[dict[str, str]]) -> Generator[Part, None, None]:
        """Yield the parts of the answer to ``messages``; closing the generator stops it. Raises VllmliteError, and
        KeyboardInterrupt if Ctrl-C stopped the answer."""
        prompt = session.chat_prompt(self._engine, messages, self._template)
        request_id = str(self._num_turns)
        self._num_turns += 1
        parser = None if self._style is None else ThinkParser(self._style, prompt["prompt"])
        count, output = 0, None
        with _interruptible() as interrupted:
            outputs = session.stream(self._engine, request_id, prompt, self._params, interrupted=interrupted)
            try:
                for output in outputs:
                    count += len(output.outputs[0].token_ids)
                    text = output.outputs[0].text
                    yield from [Content(text)] if parser is None else parser.feed(text)
                if parser is not None:
                    yield from parser.finish()
                if interrupted:
                    raise KeyboardInterrupt
            finally:
                outputs.close()
                if output is not None:
                    self.tally.add(output, count)

    def close(self) -> None:
        """Do nothing: the engine has no resources that belong to the conversation."""


class Conversation:
    """The messages of a conversation and the :class:`Answerer` that answers them."""

    def __init__(self, answerer: Answerer, system: str | None) -> None:
        """Start an empty conversation with an optional ``system`` message."""
        self.messages: list[dict[str, str]] = []
        self._answerer = answerer
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Drop all messages but the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def command(self, line: str) -> bool:
        """Execute a line that begins with a slash; return False if the model failed to answer."""
        name, _, rest = line.partition(" ")
        if name == "/retry" and self.messages and self.messages[-1]["role"] == "assistant":
            *earlier, question, _ = self.messages
            return self._ask([*earlier, question])
        elif name == "/retry":
            print("there is no answer yet", file=sys.stderr)
        elif name == "/help":
            print(HELP, file=sys.stderr)
        elif name == "/reset":
            self.reset()
        elif name == "/system":
            if rest.strip():
                self._system = rest.strip()
                self.reset()
            print(f"system: {self._system or 'none'}", file=sys.stderr)
        else:
            print(f"unknown command {name}; /help lists the commands", file=sys.stderr)
        return True

    def say(self, text: str) -> bool:
        """Send ``text`` and print the answer as it arrives; return False if that failed.

        Without an answer the conversation stays unchanged."""
        return self._ask([*self.messages, {"role": "user", "content": text}])

    def _ask(self, messages: list[dict[str, str]]) -> bool:
        """Get an answer to ``messages``. If it succeeds, ``messages`` and the answer become the conversation."""
        answer, screen, error = "", Screen(), None
        try:
            with closing(self._answerer.answer(messages)) as parts:
                for part in parts:
                    if isinstance(part, Content):
                        answer += part.text
                    screen.write(part)
        except KeyboardInterrupt:
            pass  # keep the answer so far
        except VllmliteError as e:
            error = e
        if error is None or screen.has_text:
            screen.end()
        if error is not None:
            print(f"vllmlite: error: {visible(str(error))}", end="", file=sys.stderr)
            print("; /reset starts a new conversation" if len(messages) > 1 else "", file=sys.stderr)
        elif answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        return error is None


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yield a list to which Ctrl-C appends, so that no step is interrupted; a second Ctrl-C ends the program."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise SystemExit(130)
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _read_turn(interactive: bool) -> str | None:
    """Return the next message (lines ending in a backslash are continued), or None at the end of input."""
    lines: list[str] = []
    try:
        while True:
            line = input(("... " if lines else "> ") if interactive else "")
            line = line.removeprefix("\ufeff").removesuffix("\r")
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)
    except EOFError:
        if interactive:
            print(file=sys.stderr)
        return "\n".join(lines) if lines else None


def _edit_lines() -> None:
    """Enable line editing and history at the prompt, if Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
