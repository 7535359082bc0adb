"""`chat`: the app, an answer on the terminal, or a conversation there."""

import argparse
import sys

from pipeline.errors import UserError
from pipeline.plan.session import Session
from pipeline.printing import say


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", help="answer once and end")
    parser.add_argument("--cli", action="store_true", help="talk on the terminal")
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--trust-code", action="store_true", help="run code that a folder from elsewhere names")
    parser.set_defaults(takes_names=True)


def chat(session: Session, overrides: list[str], flags: argparse.Namespace) -> int:
    """Talk to the model that was named, else to the last chat model of the configuration, or the newest."""
    from pipeline.artifacts.find_model import default_model, find_model
    from pipeline.ui.models import find_models

    if len(flags.names) > 1:
        raise UserError("takes one model", "chat", "The app offers the others.")
    name = next(iter(flags.names), None)
    chosen, why = find_model(session, overrides, name, flags.trust_code) if name else default_model(session, overrides)
    models = [chosen, *(m for m in find_models(session.store) if m.key != chosen.key)]
    say(f"Model: {chosen.label}, {why}", file=sys.stderr)
    device = session.settings.launch.device
    if flags.prompt is None and not flags.cli:
        from pipeline.ui.app import launch_app

        app = session.settings.app
        if app.insecure:
            print("WARNING: app.insecure=true: anyone who reaches the address can use the model.", file=sys.stderr)
        launch_app(models, app, device, on_ready=_say_address)
        return 0
    from pipeline.ui.chat import ChatSession, ChatSettings
    from pipeline.ui.terminal import answer_once, talk

    settings = ChatSettings(flags.temperature, flags.top_k, flags.top_p, flags.max_tokens, flags.seed)
    settings.check()
    loaded = ChatSession.load(*models[0].open(), device)
    if flags.prompt is not None:
        return answer_once(loaded, flags.prompt, settings, flags.system)
    return talk(loaded, settings, flags.system, models[0].label)


def _say_address(url: str) -> None:
    say(f"Chat at {url} (Ctrl-C ends it)")
