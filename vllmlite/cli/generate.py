"""``vllmlite generate``: complete prompts from the command line, a file or standard input."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vllmlite.cli import report, session
from vllmlite.cli.prompts import PromptEntry, add_prompt_arguments, read_prompts
from vllmlite.cli.sampling import (
    add_beam_arguments,
    add_sampling_arguments,
    given_beams,
    given_sampling,
    sampling_from_mapping,
)
from vllmlite.cli.screen import for_output
from vllmlite.errors import ParameterError
from vllmlite.lora.request import LoRARequest
from vllmlite.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from vllmlite.cli.parser import OptionParser
    from vllmlite.llm_engine import LLMEngine, Prompt
    from vllmlite.outputs import CompletionOutput, Logprob, RequestOutput


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    prompts = add_prompt_arguments(parser)
    prompts.add_argument(
        "--chat", action="store_true", help="treat prompts as user messages: apply the chat template"
    )
    prompts.add_argument("--system", metavar="TEXT", help="system message; needs --chat")
    prompts.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help="chat template to use instead of the model's: a file, or the name of one",
    )
    prompts.add_argument(
        "--lora",
        metavar="PATH",
        help="LoRA adapter to use: a directory in PEFT's format, or a GGUF file; see the LoRA options",
    )
    session.add_session_arguments(parser)
    add_sampling_arguments(parser, max_tokens=128)
    add_beam_arguments(parser)
    output = parser.add_argument_group("output options")
    output.add_argument("--json", action="store_true", help="print one JSON object per completion and line")
    output.add_argument("--no-echo", action="store_true", help="do not print the prompt (implied by --chat)")
    stats_help = (
        'print statistics to standard error; with --json, a last line {"stats": ...} to standard output'
    )
    output.add_argument("--stats", action="store_true", help=stats_help)


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt with the parameters of its request."""

    prompt: Prompt
    params: SamplingParams
    priority: int
    adapter: LoRARequest | None


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Complete the prompts and print the completions."""
    for name in ("system", "chat_template"):
        if getattr(args, name) is not None and not args.chat:
            parser.error(f"--{name.replace('_', '-')} needs --chat")
    config = session.engine_config(args, parser)
    session.print_on_first_rank(config)
    adapter = None
    if args.lora is not None:
        config, adapter = replace(config, enable_lora=True), LoRARequest(args.lora, 1, args.lora)
    if config.skip_tokenizer_init and not args.json:
        parser.error("without a tokenizer only token ids can be printed: add --json")
    try:
        given = given_sampling(args) | given_beams(args)
    except ParameterError as error:
        parser.error(str(error))
    entries = read_prompts(args, session.checked_params(SamplingParams(), given, parser), parser)
    template = session.read_chat_template(args.chat_template, parser)
    started = session.start(config, args.verbose)
    base = session.checked_params(started.engine.default_sampling_params, given, parser)
    jobs = [
        Job(
            _prompt(entry, started.engine, args, template),
            sampling_from_mapping(base, entry.options),
            entry.priority,
            adapter,
        )
        for entry in entries
    ]
    tally = report.Run(started)
    if len(jobs) == 1 and jobs[0].params.n == 1 and jobs[0].params.beams is None and not args.json:
        _stream(started.engine, jobs[0], _echo(args), tally)
    else:
        _run_all(started.engine, jobs, args, tally)
    if args.stats:
        statistics = tally.statistics()
        if args.json:
            print(json.dumps({"stats": statistics}))
        else:
            sys.stdout.flush()
            print(report.table(statistics), file=sys.stderr)
    return 0


def _prompt(entry: PromptEntry, engine: LLMEngine, args: argparse.Namespace, template: str | None) -> Prompt:
    if not args.chat or not isinstance(entry.prompt, str):
        return entry.prompt
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    return session.chat_prompt(engine, [*messages, {"role": "user", "content": entry.prompt}], template)


def _echo(args: argparse.Namespace) -> bool:
    return not (args.no_echo or args.chat)


def _stream(engine: LLMEngine, job: Job, echo: bool, tally: report.Run) -> None:
    """Print one completion as it is generated."""
    count = 0
    outputs = session.stream(engine, "0", job.prompt, job.params, job.priority, adapter=job.adapter)
    for number, output in enumerate(outputs):
        if echo and number == 0:
            print(for_output(_prompt_text(engine, output)), end="")
        count += len(output.outputs[0].token_ids)
        print(for_output(output.outputs[0].text), end="", flush=True)
    print(flush=True)
    tally.add(output, count)


def _run_all(engine: LLMEngine, jobs: list[Job], args: argparse.Namespace, tally: report.Run) -> None:
    """Run all jobs together and print their completions in the order of the prompts."""
    headings = len(jobs) > 1 or jobs[0].params.n > 1
    for index, output in enumerate(_in_order(engine, jobs)):
        tally.add(output, sum(len(c.token_ids) for c in output.outputs))
        for completion in output.outputs:
            if args.json:
                print(
                    for_output(json.dumps(_as_json(index, output, completion), ensure_ascii=False)),
                    flush=True,
                )
                continue
            if headings:
                if index or completion.index:
                    print()
                number = f"{index + 1}/{len(jobs)}"
                if len(output.outputs) > 1:
                    number += f", completion {completion.index + 1}/{len(output.outputs)}"
                print(f"==> {number} <==")
            text = (_prompt_text(engine, output) if _echo(args) else "") + completion.text
            print(for_output(text), flush=True)


def _prompt_text(engine: LLMEngine, output: RequestOutput) -> str:
    """Return the prompt as it was given, or the text of its token ids."""
    if output.prompt is not None:
        return output.prompt
    return engine.get_tokenizer().decode(output.prompt_token_ids)


def _in_order(engine: LLMEngine, jobs: list[Job]) -> Iterator[RequestOutput]:
    """Run all jobs together; yield outputs in the order of ``jobs``, each as soon as it can be."""
    for index, job in enumerate(jobs):
        params = job.params.clone(output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(str(index), job.prompt, params, lora_request=job.adapter, priority=job.priority)
    progress = report.Progress(len(jobs))
    finished: dict[str, RequestOutput] = {}
    for index in range(len(jobs)):
        while str(index) not in finished:
            outputs = engine.step()
            finished.update((output.request_id, output) for output in outputs)
            progress.advance(len(outputs))
        session.raise_on_error(engine, str(index))
        yield finished.pop(str(index))


def _as_json(index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    metrics = output.metrics
    line: dict[str, Any] = {
        "index": index,
        "completion": completion.index,
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "metrics": None,
    }
    if metrics is not None and metrics.finished_time is not None:
        ttft = metrics.time_to_first_token
        line["metrics"] = {
            "time_to_first_token": None if ttft is None else round(ttft, 6),
            "seconds": round(metrics.finished_time - metrics.arrival_time, 6),
        }
    if completion.logprobs is not None or completion.cumulative_logprob is not None:
        line["cumulative_logprob"] = completion.cumulative_logprob
    if completion.logprobs is not None:
        line["logprobs"] = [_logprobs(entry) for entry in completion.logprobs]
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [entry and _logprobs(entry) for entry in output.prompt_logprobs]
    return line


def _logprobs(entry: dict[int, Logprob]) -> dict[str, dict[str, Any]]:
    return {str(token_id): asdict(logprob) for token_id, logprob in entry.items()}
