"""`chat`: the app, one answer in the terminal, or a conversation there."""

import sys

from pipeline.commands.find_model import TRUST_CODE, default_model, find_model
from pipeline.commands.parser import Parser
from pipeline.plan.session import Session
from pipeline.printing import say
from pipeline.ui.chat import ChatSession, ChatSettings
from pipeline.ui.models import find_models


def chat(arguments: list[str]) -> int:
    """Chat with the model that was named, else with the last chat model of the configuration, or the newest."""
    parser, usual = Parser("chat", "[MODEL]", most=1), ChatSettings()
    parser.add_argument("--prompt", metavar="TEXT", help="print one answer and exit")
    parser.flag("--cli", help="chat in the terminal")
    parser.add_argument("--system", metavar="TEXT", default="", help="a system prompt")
    parser.add_argument("--temperature", type=float, default=usual.temperature)
    parser.add_argument("--top-k", type=int, default=usual.top_k)
    parser.add_argument("--top-p", type=float, default=usual.top_p)
    parser.add_argument("--max-tokens", type=int, default=usual.max_tokens)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.flag("--trust-code", help=TRUST_CODE)
    flags = parser.parse(arguments)
    session = Session.open(flags.overrides)
    if flags.names:
        chosen, why = find_model(session, flags.overrides, flags.names[0], flags.trust_code)
    else:
        chosen, why = default_model(session, flags.overrides)
    say(f"Model: {chosen.label}, {why}", file=sys.stderr)
    device = session.settings.launch.device
    if flags.prompt is None and not flags.cli:
        from pipeline.ui.app import launch_app

        app = session.settings.app
        if app.insecure:
            print("WARNING: app.insecure=true: anyone who reaches the address can use the model.", file=sys.stderr)
        models = [chosen, *(model for model in find_models(session.store) if model.key != chosen.key)]
        launch_app(models, app, device, on_ready=lambda url: say(f"Chat at {url} (Ctrl-C ends it)"))
        return 0
    from pipeline.ui.terminal import answer_once, talk

    settings = ChatSettings(flags.temperature, flags.top_k, flags.top_p, flags.max_tokens, flags.seed)
    settings.check()
    loaded = ChatSession.load(*chosen.open(), device)
    if flags.prompt is not None:
        return answer_once(loaded, flags.prompt, settings, flags.system)
    return talk(loaded, settings, flags.system, chosen.label)
