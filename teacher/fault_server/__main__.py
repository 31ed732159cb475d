"""The command: `python -m teacher.fault_server`."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import teacher.fault_server
from schemas.errors import BimodeError, ConfigError
from teacher.fault_server import (
    PASSING_FAULTS,
    EngineModel,
    Fault,
    FaultSchedule,
    FaultServer,
    Restarts,
    hashed_answer,
    question_text,
)
from teacher.fault_server.recorded import recorded_answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status."""
    options = _parser().parse_args(arguments)
    # Blocked before any thread exists, so that only sigwait sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        server = _server_of(options).start()
    except BimodeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"url": server.url, "port": server.port, "models": server.models}), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m teacher.fault_server", description=(teacher.fault_server.__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=0, help="0 takes a free one and says which")
    add("--model", action="append", help="a model name to serve; repeatable (default: teacher)")
    add("--mean-tokens", type=int, default=16, help="mean length of the answers in words")
    add("--replies", type=Path, action="append", metavar="FILE", help="answer from compacted journals; repeatable")
    add("--faults", type=float, default=0.0, metavar="SHARE", help="share of the calls that go wrong")
    add("--kinds", help="kinds of faults, with commas between; or all (default: those a retry overcomes)")
    add("--max-faults-per-request", type=int, default=3, help="a request asked more often is answered well")
    add("--retry-after", default="0", help="header of 429 and 503")
    add("--seed", type=int, default=0, help="of faults and latencies")
    add("--latency", type=float, default=0.0, metavar="SECONDS", help="until the first token")
    add("--latency-shape", choices=["fixed", "uniform", "lognormal"], default="fixed")
    add("--latency-spread", type=float, default=0.5, help="relative half width, or deviation of the logarithm")
    add("--max-sequences", type=int, help="as many run at once, the rest wait")
    add("--tokens-per-second", type=float, help="of a sequence that runs alone")
    add("--half-speed-sequences", type=float, default=math.inf, help="one more than this run at half the speed")
    add("--kv-cache-tokens", type=int, help="room for all running sequences; overflow preempts")
    add("--cached-prompts", type=int, default=0, help="as many prompts, the last ones, count as cached")
    add("--restart-at", default="", metavar="NUMBERS", help="numbers of calls the engine dies of, with commas between")
    add("--restart-every", type=float, metavar="SECONDS", help="from one death of the engine to the next")
    add("--down-seconds", type=float, default=0.5, help="how long the engine is away")
    add("--poison", metavar="TEXT", help="a question with this text in it kills the engine whenever it is asked")
    add("--log", type=Path, metavar="FILE", help="append a JSON line of each call here")
    return parser


def _server_of(options: argparse.Namespace) -> FaultServer:
    """Returns the server that the options describe. Raises ConfigError: if they make no sense."""
    poison: str | None = options.poison
    return FaultServer(
        recorded_answer(options.replies) if options.replies else hashed_answer(options.mean_tokens),
        models=options.model or ["teacher"],
        faults=FaultSchedule(
            share=options.faults,
            kinds=_parse_kinds(options.kinds),
            seed=options.seed,
            max_faults_per_request=options.max_faults_per_request,
            persistent=None if poison is None else lambda body: Fault.KILL if poison in question_text(body) else None,
            retry_after=options.retry_after,
        ),
        engine=EngineModel(
            latency_seconds=options.latency,
            latency_shape=options.latency_shape,
            latency_spread=options.latency_spread,
            max_sequences=options.max_sequences,
            tokens_per_second=options.tokens_per_second,
            half_speed_sequences=options.half_speed_sequences,
            kv_cache_tokens=options.kv_cache_tokens,
            cached_prompts=options.cached_prompts,
            seed=options.seed,
        ),
        restarts=Restarts(
            at_calls=_parse_numbers(options.restart_at),
            every_seconds=options.restart_every,
            down_seconds=options.down_seconds,
        ),
        host=options.host,
        port=options.port,
        log_path=options.log,
        keep_calls=False,
    )


def _parse_kinds(text: str | None) -> tuple[Fault, ...]:
    if text is None:
        return PASSING_FAULTS
    if text == "all":
        return tuple(Fault)
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in set(Fault)]
    if unknown:
        raise ConfigError(f"there is no fault {unknown[0]!r}; there are {', '.join(Fault)}")
    return tuple(Fault(name) for name in names)


def _parse_numbers(text: str) -> tuple[int, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not all(name.isdecimal() for name in names):
        raise ConfigError(f"--restart-at takes numbers of calls with commas between, not {text!r}")
    return tuple(int(name) for name in names)


if __name__ == "__main__":
    sys.exit(main())
