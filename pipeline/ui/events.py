"""Checks of what a browser sends to Gradio's page, before Gradio works on it: Gradio answers anything else with a
traceback."""

from typing import Any

import gradio as gr
from gradio.components import Component
from pydantic_core import from_json

# Types that the handlers of these events are passed beside the values of components.
DETAILS = {
    "example_select": gr.SelectData,
    "retry": gr.RetryData,
    "undo": gr.UndoData,
    "edit": gr.EditData,
}


def find_mistake(blocks: gr.Blocks, sent: bytes) -> str | None:
    """What is wrong with an event; None for one as the page sends it."""
    try:
        event = from_json(sent)
        function, values = blocks.fns[event["fn_index"]], event["data"]
        if function.fn is None:
            return "the server does not handle this event"
        if len(values) != len(function.inputs) or event.get("batched"):
            return f"expected {len(function.inputs)} values"
        for component, value in zip(function.inputs, values, strict=True):
            if isinstance(component, Component) and not isinstance(
                component, gr.State
            ):  # its value never leaves the server
                component.preprocess(value)
        for _, name in function.targets:
            if name in DETAILS:
                _check_detail(name, DETAILS[name](None, event.get("event_data")))
    except Exception as error:  # components raise anything for values that they do not expect
        return f"not an event of this page ({type(error).__name__}: {str(error)[:200]})"
    return None


def _check_detail(name: str, detail: Any) -> None:
    """Raises TypeError, KeyError."""
    index = detail.index[0] if isinstance(detail.index, list) else detail.index
    if not isinstance(index, int):
        raise TypeError("the index is not a number")
    if name == "example_select":
        detail.value["text"].strip()
