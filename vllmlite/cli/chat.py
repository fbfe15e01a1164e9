"""``vllmlite chat``: a conversation in the terminal, or over a pipe with a line a turn."""

from __future__ import annotations

import signal
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

from vllmlite.cli import report, session
from vllmlite.cli.sampling import add_sampling_arguments, given_sampling
from vllmlite.config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.options import given
from vllmlite.sampling_params import SamplingParams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator
    from types import FrameType

    from vllmlite.cli.parser import OptionParser

ABOUT = """\
Each turn sends the whole conversation, whose earlier turns are in the prefix
cache. Standard input may be a pipe: a line is a turn."""

HELP = """\
/help          this text
/system TEXT   set the system message, and start again; without TEXT, show it
/reset         forget the conversation
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer. Anything else is said to the model; a line that begins with // says one with /."""

NOT_HERE = {"n", "logprobs", "prompt_logprobs", "detokenize", "truncate_prompt_tokens"}
"""Sampling flags that have no use in a conversation."""


def add_arguments(parser: OptionParser) -> None:
    """Declare the options."""
    conversation = parser.add_argument_group("conversation", ABOUT)
    parser.epilog = "commands in the conversation:\n" + "\n".join("  " + line for line in HELP.splitlines())
    conversation.add_argument(
        "--url",
        metavar="URL",
        help="talk to a server with OpenAI's API; --model is then its name for a model",
    )
    conversation.add_argument("--api-key", metavar="KEY", help="for --url; default: $OPENAI_API_KEY")
    conversation.add_argument("--system", metavar="TEXT", help="system message")
    conversation.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template in place of the model's"
    )
    session.add_session_arguments(parser)
    add_sampling_arguments(parser, max_tokens=512, exclude=NOT_HERE)
    output = parser.add_argument_group("output options")
    output.add_argument("--stats", action="store_true", help="statistics on standard error at the end")


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Talk until the input ends."""
    session.checked_params(SamplingParams(), given_sampling(args), parser)
    template = session.read_chat_template(args.chat_template, parser)
    answerer = _local(args, template, parser) if args.url is None else _remote(args, template, parser)
    with closing(answerer):
        _talk(Conversation(answerer, args.system))
    if args.stats and isinstance(answerer, Engine):
        print(report.table(answerer.tally.statistics()), file=sys.stderr)
    return 0


def _talk(conversation: Conversation) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        _edit_lines()
        print("/help tells what there is to say beside the conversation.", file=sys.stderr)
    while (line := _read_line(interactive)) is not None:
        text = line.strip()
        if text in ("/quit", "/exit"):
            break
        if text.startswith("/") and not text.startswith("//"):
            conversation.command(text)
        elif text:
            conversation.say(text.removeprefix("/"))


def _local(args: argparse.Namespace, template: str | None, parser: OptionParser) -> Engine:
    config = session.engine_config(args, parser)
    if config.skip_tokenizer_init:
        parser.error("a conversation needs a tokenizer: leave out --skip-tokenizer-init")
    started = session.start(config, args.verbose)
    params = session.checked_params(started.engine.default_sampling_params, given_sampling(args), parser)
    if template is None and not started.engine.get_tokenizer().has_chat_template:
        raise ParameterError("model", config.model, "has no chat template: give --chat-template FILE")
    return Engine(started, params, template)


def _remote(args: argparse.Namespace, template: str | None, parser: OptionParser) -> Answerer:
    from vllmlite.cli.chat_remote import Server

    here = [*(given(args, EngineConfig).keys() - {"model"})]
    for name in here + [name for name in ("config", "stats") if getattr(args, name)]:
        parser.error(
            f"--{name.replace('_', '-')} is for an engine in this process: it does not go with --url"
        )
    options = given_sampling(args) | ({} if template is None else {"chat_template": template})
    return Server(args.url, getattr(args, "model", None), args.api_key, options)


class Answerer(Protocol):
    """What a conversation is held with."""

    def answer(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """Pieces of the answer to ``messages``; closing the generator ends it. Raises VllmliteError."""
        ...

    def close(self) -> None:
        """The conversation has ended."""
        ...


class Engine:
    """An engine in this process."""

    def __init__(self, started: session.Session, params: SamplingParams, template: str | None) -> None:
        """Answer with ``params``, through ``template`` or the model's own."""
        self.tally = report.Run(started)
        self._engine = started.engine
        self._params = params
        self._template = template
        self._num_turns = 0

    def answer(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """See :class:`Answerer`."""
        prompt = session.chat_prompt(self._engine, messages, self._template)
        request_id = str(self._num_turns)
        self._num_turns += 1
        count, output = 0, None
        with closing(session.stream(self._engine, request_id, prompt, self._params)) as outputs:
            try:
                for output in outputs:
                    count += len(output.outputs[0].token_ids)
                    yield output.outputs[0].text
            finally:
                if output is not None:
                    self.tally.add(output, count)

    def close(self) -> None:
        """See :class:`Answerer`."""


class Conversation:
    """The messages so far, and who answers them."""

    def __init__(self, answerer: Answerer, system: str | None) -> None:
        """An empty conversation under the ``system`` message."""
        self.messages: list[dict[str, str]] = []
        self._answerer = answerer
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        name, _, rest = line.partition(" ")
        if name == "/help":
            print(HELP, file=sys.stderr)
        elif name == "/reset":
            self.reset()
        elif name == "/system":
            if rest.strip():
                self._system = rest.strip()
                self.reset()
            print(f"system: {self._system or 'none'}", file=sys.stderr)
        else:
            print(f"no command {name}; /help lists them", file=sys.stderr)

    def say(self, text: str) -> None:
        """Add a turn and print the answer as it comes; a turn that cannot be answered is taken back."""
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            with _interruptible() as interrupted, closing(self._answerer.answer(self.messages)) as pieces:
                for piece in pieces:
                    answer += piece
                    print(piece, end="", flush=True)
                    if interrupted:
                        break
            print(flush=True)
        except ParameterError as e:
            self.messages.pop()
            hint = "; /reset forgets the conversation" if len(self.messages) > 1 else ""
            print(f"vllmlite: error: {e}{hint}", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": answer})


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that fills at Ctrl-C, so that a step is never cut short; the second Ctrl-C is a KeyboardInterrupt."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of input. Ctrl-C at the prompt drops what was typed."""
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            if interactive:
                print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\nCtrl-D or /quit leaves.", file=sys.stderr)


def _edit_lines() -> None:
    """Line editing and history at the prompt, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
