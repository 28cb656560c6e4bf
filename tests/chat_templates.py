"""Chat templates as families of models write them, in miniature, with the marks of the assistant's part.

Each has ``{% generation %}`` marks; ``unmarked`` takes them out, which is how models are published.
"""

import re

# Trimmed content, a header of special tokens, the date in the system's turn, one call of a tool as bare JSON
LLAMA = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|system|>\n\nToday Date: ' + today + '\n' }}"
    "{%- if tools %}{%- for t in tools %}{{- t | tojson }}{{- '\n' }}{%- endfor %}{%- endif %}{{- '<|eot|>' }}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>\n\n' }}{% generation %}"
    "{%- if m.tool_calls %}{{- m.tool_calls[0].function | tojson }}{%- else %}{{- m.content | trim }}{%- endif %}"
    "{{- '<|eot|>' }}{% endgeneration %}"
    "{%- else %}{{- '<|' + m.role + '|>\n\n' + m.content | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n\n' }}{%- endif %}"
)
# ChatML: a newline behind the end of a turn; tool results in the user's turn; tools in the system's
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools' }}{%- for t in tools %}{{- '\n' }}{{- t | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{% generation %}"
    "{%- if m.content %}{{- m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' }}{{- call.function | tojson }}{{- '</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{% endgeneration %}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Reasoning: turns before the last question lose theirs, later ones have a block for it even if it is empty
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set said = m.content or '' %}{%- set thought = '' %}"
    "{%- if '</think>' in said %}{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set said = said.split('</think>')[-1] %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{% generation %}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' + thought.strip() + '\n</think>\n\n' }}{%- endif %}"
    "{{- said.strip() }}"
    "{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' }}{{- call.function | tojson }}{{- '</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{% endgeneration %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# No opening of an answer; tools in front of the last question only, so that earlier text changes with later turns
MISTRAL = (
    "{{- bos_token }}{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if tools and m == users[-1] %}{{- '[TOOLS]' }}{{- tools | tojson }}{{- '[/TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'tool' %}{{- '[RESULT]' + m.content + '[/RESULT]' }}"
    "{%- else %}{% generation %}{%- if m.tool_calls %}{{- '[CALLS]' }}{{- m.tool_calls | tojson }}{{- eos_token }}"
    "{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{% endgeneration %}{%- endif %}{%- endfor %}"
)
# The assistant is called model; every turn ends with a token and a newline; roles must alternate
GEMMA = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if m.role == 'assistant' %}{{- '<start_of_turn>model\n' }}{% generation %}"
    "{{- m.content | trim + '<end_of_turn>\n' }}{% endgeneration %}"
    "{%- else %}{{- '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
# Neither an opening of an answer nor a token at its end: the newline ends it
BARE = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- 'Bot: ' }}{% generation %}{{- m.content + '\n' }}"
    "{% endgeneration %}{%- else %}{{- m.role + ': ' + m.content + '\n' }}{%- endif %}{%- endfor %}"
)
TEMPLATES = {"llama": LLAMA, "qwen": QWEN, "qwen3": QWEN3, "mistral": MISTRAL, "gemma": GEMMA, "bare": BARE}
TOOL_USERS = ("llama", "qwen", "qwen3", "mistral")
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "[INST]"]


def unmarked(template: str) -> str:
    """The template without its marks, and so with the same text."""
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)
