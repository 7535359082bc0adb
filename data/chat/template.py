"""The chat template of exported tokenizers: data.chat.conversation.render in Jinja, with checks of its own.

Beside our own messages it reads what clients of other tools send: content as a list of text parts, by every role, and
calls of the calculator as `tool_calls` and `role: tool`, which become parts of one assistant's turn. Everything else is
refused by raise_exception, so that nothing is rendered as something that the model never saw in training. `tools` may
name only the calculator, and is not rendered: the model knows its tool.

OpenAI's clients send the arguments of a call as JSON text, which Jinja cannot parse: the text is split at its quotation
marks, and refused if anything but these is escaped in it.

vLLM hands parts on unchanged to a template with a loop over message['content'], and joins them by newlines for others.

{% generation %} marks what a model is trained to write, for transformers' masks. It is written without dashes, because
older versions of Hugging Face's JavaScript implementation know only that form. It cannot be used in a macro, whose
output is not where transformers counts from.
"""

CHAT_TEMPLATE = """\
{%- macro text(content, where) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is undefined or content is none or content is mapping or content is not iterable -%}
{{- raise_exception('The content of ' ~ where ~ ' is not text.') -}}
{%- else -%}
{%- for part in content -%}
{%- if part is not mapping or part['type'] != 'text' or part['text'] is not string -%}
{{- raise_exception('The content of ' ~ where ~ ' has a part that is not {"type": "text", "text": ...}.') -}}
{%- endif -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}

{%- macro call(calls, where) -%}
{%- set called = calls[0]['function'] or calls[0] -%}
{%- set given = called['arguments'] -%}
{%- if given is string and '\\\\' not in given | replace('\\\\"', '') -%}
{%- set quoted = (given | replace('\\n', ' ') | replace('\\\\"', '\\n')).split('"') -%}
{%- if quoted | length == 5 and quoted[1] == 'expression'
    and quoted[0] | trim ~ quoted[2] | trim ~ quoted[4] | trim == '{:}' -%}
{%- set given = {'expression': quoted[3] | replace('\\n', '"')} -%}
{%- endif -%}
{%- endif -%}
{%- if calls | length > 1 -%}
{{- raise_exception('There are several tool calls in ' ~ where ~ '. Give each its own message.') -}}
{%- elif called['name'] not in ('python', 'calculator') -%}
{{- raise_exception('The tool call of ' ~ where ~ ' is not to python, the only tool of this model.') -}}
{%- elif given is not mapping or given | length != 1 or given['expression'] is not string -%}
{{- raise_exception('The tool call of ' ~ where ~ ' needs the arguments {"expression": "..."}, as an object if the '
    ~ 'expression has a backslash.') -}}
{%- endif -%}
{{- '<|python_start|>' ~ given['expression'] ~ '<|python_end|>' -}}
{%- endmacro -%}

{%- for tool in tools or [] -%}
{%- if (tool['function'] or tool)['name'] not in ('python', 'calculator') -%}
{{- raise_exception('Tool ' ~ loop.index ~ ' is not python, the only tool of this model. Leave it out of tools.') -}}
{%- endif -%}
{%- endfor -%}

{{- '<|bos|>' -}}
{%- set ns = namespace(due='user', system='', open=false, pieces=[], said='') -%}
{%- for message in messages -%}
{%- set role = message['role'] -%}
{%- set content = message['content'] -%}
{%- set where = 'message ' ~ loop.index -%}
{%- if role == 'system' and loop.first -%}
{%- set ns.system = text(content, where) ~ '\\n\\n' -%}
{%- elif role != ns.due -%}
{{- raise_exception('Message ' ~ loop.index ~ ' is by ' ~ role ~ ' where ' ~ ns.due ~ ' is due.') -}}
{%- elif role == 'user' -%}
{{- '<|user_start|>' ~ ns.system ~ text(content, where) ~ '<|user_end|>' -}}
{%- set ns.system = '' -%}
{%- set ns.due = 'assistant' -%}
{%- elif role == 'tool' -%}
{{- '<|output_start|>' ~ text(content, where) ~ '<|output_end|>' -}}
{%- set ns.due = 'assistant' -%}
{%- else -%}
{%- if not ns.open -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
{%- set ns.pieces = [] -%}
{%- set ns.said = '' -%}
{%- if content is string -%}
{%- set ns.said = content -%}
{%- elif content is iterable and content is not mapping and content is defined and content is not none -%}
{%- for part in message['content'] -%}
{%- if part is mapping and part['type'] == 'python' and part['text'] is string -%}
{%- set ns.said = ns.said ~ '<|python_start|>' ~ part['text'] ~ '<|python_end|>' -%}
{%- elif part is mapping and part['type'] == 'python_output' and part['text'] is string -%}
{%- set ns.pieces = ns.pieces + [[ns.said, '<|output_start|>' ~ part['text'] ~ '<|output_end|>']] -%}
{%- set ns.said = '' -%}
{%- else -%}
{%- set ns.said = ns.said ~ text([part], where) -%}
{%- endif -%}
{%- endfor -%}
{%- elif not message['tool_calls'] -%}
{{- raise_exception('The content of ' ~ where ~ ' is not text.') -}}
{%- endif -%}
{%- if message['tool_calls'] -%}
{%- set ns.said = ns.said ~ call(message['tool_calls'], where) -%}
{%- set ns.due = 'tool' -%}
{%- set ns.open = true -%}
{%- else -%}
{%- set ns.said = ns.said ~ '<|assistant_end|>' -%}
{%- set ns.due = 'user' -%}
{%- set ns.open = false -%}
{%- endif -%}
{%- for piece in ns.pieces + [[ns.said, '']] -%}
{%- if message['weight'] == 0 -%}
{{- piece[0] -}}
{%- elif piece[0] -%}
{% generation %}{{- piece[0] -}}{% endgeneration %}
{%- endif -%}
{{- piece[1] -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if not messages -%}
{{- raise_exception('A conversation needs at least one message.') -}}
{%- elif ns.due == 'tool' -%}
{{- raise_exception('The last message calls a tool. Add its result as a message by tool.') -}}
{%- elif ns.system -%}
{{- raise_exception('A system message alone is not a conversation.') -}}
{%- elif add_generation_prompt and not ns.open -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""
