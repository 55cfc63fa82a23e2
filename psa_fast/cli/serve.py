"""`psa-fast serve` puts the guard behind HTTP, in the formats of other people's clients."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from dataclasses import fields
from typing import Any

from psa_fast.compat.argparse import Subcommands
from psa_fast.files import shorten, shown

AUDIT_MB = 100
ENGINE_KEY = "PSA_FAST_ENGINE_KEY"
NEEDED = "this command needs fastapi, uvicorn and prometheus-client: pip install 'psa-fast[serve]'"


def register(subparsers: Subcommands) -> None:
    """Add the command `serve`."""
    from psa_fast.serve.settings import ServerSettings

    parser = subparsers.add_parser(
        "serve",
        help="answer requests over HTTP, guarded by the policy",
        description="Serve /v1/chat/completions, /v1/moderations and LiteLLM's generic guardrail. Every request is "
        "read by the concept head before anything is answered; no address in a request is fetched.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="add-on folder (psa_config.json, psa.safetensors)"
    )
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-on's config names)")
    parser.add_argument("--policy", metavar="FILE", help="policy YAML (default: the shipped one)")
    parser.add_argument("--shadow", metavar="FILE", help="a second policy, which is counted and logged, never applied")
    parser.add_argument("--audit", metavar="FILE", help="log of every verdict, with hashes in the place of content")
    parser.add_argument(
        "--audit_mb", type=int, metavar="N", help=f"size at which the audit log is renamed (default: {AUDIT_MB})"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: 8000)")
    parser.add_argument("--api_keys", metavar="FILE", help="keys, one a line; more may be in PSA_FAST_API_KEYS")
    parser.add_argument(
        "--operator_keys",
        metavar="FILE",
        help="keys, one a line, of those who may set, clear or clip a concept and have a verdict explained",
    )
    parser.add_argument("--explain", action="store_true", help="explain a verdict to everybody who may ask")
    parser.add_argument(
        "--open", action="store_true", help="listen on an address that others reach, without any API key"
    )
    parser.add_argument("--ui", action="store_true", help="serve a small page at / too, to try it in a browser")
    parser.add_argument(
        "--engine", metavar="URL", help="vLLM server (http://HOST:PORT/v1) of the exported model, to write the answers"
    )
    parser.add_argument("--engine_model", metavar="NAME", help="what the engine calls the exported model")
    helps = {
        "model_name": "what clients call the model",
        "max_body_mb": "largest body of a request, in MiB",
        "max_images": "most pictures of a request",
        "max_pixels": "most pixels of a picture",
        "max_inputs": "most texts of a moderation",
        "max_new_tokens": "longest answer",
        "max_batch": "most requests read together",
        "max_wait": "seconds a request waits for others to share its batch",
        "max_queue": "most requests that wait; more are answered 429",
        "timeout": "seconds until a request is given up",
    }
    for field in fields(ServerSettings):
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=field.default,
            metavar="NAME" if field.name == "model_name" else "N",
            help=f"{helps[field.name]} (default: %(default)s)",
        )
    parser.set_defaults(func=serve)


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal ends it. Raises ValueError, with a sentence, for what cannot be served."""
    from psa_fast.safety.policy import Policy
    from psa_fast.serve.api_keys import ApiKeys
    from psa_fast.serve.audit_log import AuditLog
    from psa_fast.serve.settings import ServerSettings

    settings = ServerSettings(**{field.name: getattr(args, field.name) for field in fields(ServerSettings)})
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; expected 0 to 65535")
    if args.audit_mb is not None and args.audit is None:
        raise ValueError("--audit_mb does nothing without --audit")
    if args.audit_mb is not None and args.audit_mb < 1:
        raise ValueError(f"--audit_mb is {args.audit_mb}; expected at least 1")
    keys = ApiKeys.load(args.api_keys)
    operators = ApiKeys() if args.operator_keys is None else ApiKeys.load(args.operator_keys, {})
    if operators.shares(keys):
        raise ValueError(f"--operator_keys {shown(args.operator_keys)}: one is an API key of others too")
    if args.open and keys:
        raise ValueError("--open is for a server without API keys, and there are some; leave it or them out")
    if not keys and not args.open and not _is_loopback(args.host):
        raise ValueError(
            f"--host {shorten(args.host)} is reached by others and there is no API key; give --api_keys FILE, or --open"
        )
    _check_engine(args)
    policy = Policy.load(args.policy)
    shadow = None if args.shadow is None else Policy.load(args.shadow)
    server, uvicorn = _server_modules()

    from psa_fast.safety.load import load_guard

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    guard = load_guard(args.model, args.base, policy)
    if args.engine is not None:
        from psa_fast.serve.vllm_engine import VllmEngine

        guard.writer = VllmEngine(guard, args.engine, args.engine_model, os.environ.get(ENGINE_KEY), settings.timeout)
    if shadow is not None:
        shadow.require_model(guard.model_hash)
    audit = None if args.audit is None else AuditLog(args.audit, args.audit_mb or AUDIT_MB)
    app = server.Server(guard, settings, keys, shadow, audit, args.ui, operators, args.explain).app
    # the log of requests names paths and addresses alone; uvicorn's own handlers would print everything twice
    uvicorn.run(
        app, host=args.host, port=args.port, log_config=None, timeout_graceful_shutdown=max(1, int(settings.timeout))
    )
    return 0


def _check_engine(args: argparse.Namespace) -> None:
    """Raise ValueError for an engine that cannot be asked."""
    if args.engine is None:
        if args.engine_model is not None:
            raise ValueError("--engine_model does nothing without --engine")
        return
    if args.engine_model is None:
        raise ValueError("--engine needs --engine_model, the name that the engine knows the exported model by")
    if args.max_images != 1:
        raise ValueError("--engine takes one picture a request: give --max_images 1")
    from psa_fast.serve.vllm_engine import check_engine

    check_engine(args.engine, os.environ.get(ENGINE_KEY))


def _server_modules() -> tuple[Any, Any]:
    try:
        import uvicorn

        from psa_fast.serve import http_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise ValueError(NEEDED) from None
        raise
    return http_app, uvicorn


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
