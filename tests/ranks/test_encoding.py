"""Messages between hosts: what is sent arrives, and nothing else than the expected types is accepted."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from vllmlite.backends.kv_cache import KVSpec
from vllmlite.engine.beams import Continuation
from vllmlite.engine.runner_protocol import StepResult, TokenLogprobs
from vllmlite.engine.schedule import Admission, Schedule, ScheduledBeams
from vllmlite.ranks.encoding import EncodingError
from vllmlite.ranks.host_messages import (
    ENCODING,
    End,
    Left,
    RankFailed,
    RankPhase,
    RankReady,
    RankRefused,
    StepCommand,
    StepDigest,
    StepReply,
)
from vllmlite.ranks.messages import BackendFacts, Failed, ModelFacts, Phase, Ready
from vllmlite.runner.cache_tiers import HostPlaces
from vllmlite.sampling_params import SamplingParams

PARAMS = SamplingParams(
    temperature=0, top_p=0.9, seed=2**40, logprobs=3, logit_bias={5: -1.5, 7: 2}, stop_token_ids=[4, 9],
    allowed_token_ids=[1, 2], min_tokens=2,
)  # fmt: skip
PARAMS.stop = PARAMS.bad_words = None  # these are not sent
SCHEDULE = Schedule(
    admissions=[Admission(3, list(range(40)), 40, PARAMS, 2**64 - 1, "MEAN", 2)],
    slots=[3], starts=[0], counts=[40], samples=[1], drafts={0: [4, 5]}, wanted={0: 2}, block_slots=[3],
    block_columns=[0], block_ids=[17], banned={0: [1, 2]}, masks={0: bytes(range(256))}, ids={0: [1]},
    beams=[ScheduledBeams(0, 0, [-0.1, -float("inf")], 1.0, 4)], copied_blocks=[(1, 2)], pools=[0], prompt_logprobs=[0],
    num_tokens=40, num_sampled=1,
)  # fmt: skip
ENTRY = TokenLogprobs(5, -0.25, 1, [5, 6], [-0.25, -3.0], [TokenLogprobs(9, -7.0, 44, [], [])])
RESULT = StepResult(
    [[5, 6]], [[ENTRY]], {0: [ENTRY]}, {0: [0.1, 1e-30]}, [[Continuation(0, 5, -0.5)]], {0: [4]}
)
READY = Ready(
    BackendFacts("cpu", "cpu", "float32", False, frozenset({"linear", "embed"}), "avx2"),
    ModelFacts(64, KVSpec(2, 2, 16, 16, "fp8_e4m3", ((1.0, 0.5), (1.0, 0.25)))),
    9, 128, "cpu", [(1, 0.5)], [], HostPlaces(9, 4096, 1e-5, b"mark"),
)  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        StepCommand(7, SCHEDULE), StepCommand(8, None), StepReply(7, RESULT), StepReply(7, None, "IndexError: 9"),
        RankReady(1, READY), RankPhase(1, Phase("loading")), RankFailed(0, Failed(3, "why")),
        RankRefused(1, "ModelError", "no weights"), StepDigest(3, b"\0\xff"), End("é", True), Left(3),
    ],
    ids=lambda message: type(message).__name__,
)  # fmt: skip
def test_a_message_arrives_as_it_was(message: object) -> None:
    assert ENCODING.decode(ENCODING.encode(message)) == message


def test_what_only_the_engine_needs_is_not_sent() -> None:
    params = SamplingParams(temperature=0, stop=["secret"], bad_words=["word"])
    sent = StepCommand(1, replace(SCHEDULE, admissions=[Admission(0, [1], 1, params, 0)]))
    content = ENCODING.encode(sent)
    assert b"secret" not in content and b"word" not in content
    found = ENCODING.decode(content).schedule.admissions[0].params
    assert found.stop is None and found.bad_words is None and found.temperature == 0


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"\xff", b'["Left",[1,2]]', b'["Left",[]]', b'["Left",{"rank":1}]', b'["Left",[true]]',
        b'["Left",["1"]]', b'["Left",[1.0]]', b'["Left",[36893488147419103232]]', b'["Setup",[1]]',
        b'["End",["x",1]]', b'["End",[null,true]]', b'["StepDigest",[1,"*"]]', b'["StepCommand",[1,[]]]',
        b'["StepReply",[1,[[["5"]],null,[],[],[],[]],null]]', b"[" * 100_000, b'["Left",[' + b"9" * 5000 + b"]]",
        pickle.dumps(Left(1)), ENCODING.encode(StepCommand(1, SCHEDULE))[:-9],
    ],
    ids=range(21),
)  # fmt: skip
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(EncodingError, match=r"^a message from another host cannot be read"):
        ENCODING.decode(content)
