"""How a prompt becomes text, and text becomes token ids."""

from typing import Any

from rlhf_ray.data.formats import Prompt
from rlhf_ray.errors import UserError

# The two published forms (Taori et al. 2023, Stanford Alpaca).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def render_prompt(prompt: Prompt, template: str, tokenizer: Any) -> str:
    """The text up to where the response begins. template: chat, alpaca or none (the last turn as it is).

    `prompt.input` has a place of its own in Alpaca's form; the others put it below the last turn. Raises UserError if
    the tokenizer has no chat template or its template refuses the turns, or if Alpaca's form gets more than one turn.
    """
    if template == "alpaca":
        if len(prompt.turns) != 1:
            raise UserError(f"data.template=alpaca takes one turn, got {len(prompt.turns)}: set data.template=chat")
        instruction = prompt.turns[0].content
        if prompt.input:
            return ALPACA_INPUT.format(instruction=instruction, input=prompt.input)
        return ALPACA.format(instruction=instruction)
    *before, last = prompt.turns
    content = f"{last.content}\n\n{prompt.input}" if prompt.input else last.content
    if template == "none":
        return content
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: set data.template=alpaca (or none)")
    messages = [{"role": m.role, "content": m.content} for m in before] + [{"role": last.role, "content": content}]
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:  # some templates refuse roles or their order
        raise UserError(f"the tokenizer's chat template refuses the roles {[m['role'] for m in messages]}: {error}; "
                        "change the data, or set data.template=alpaca (or none)") from error


def encode_prompt(prompt: Prompt, template: str, tokenizer: Any) -> list[int]:
    """Token ids of the rendered prompt, with one BOS: a chat template writes its own, the other forms get it here."""
    text = render_prompt(prompt, template, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if template != "chat" and bos is not None and ids[:1] != [bos]:
        return [bos, *ids]
    return ids


def encode_response(response: str, tokenizer: Any) -> list[int]:
    """Token ids of a response that ends: its text, then EOS."""
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
