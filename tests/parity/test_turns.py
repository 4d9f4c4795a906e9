"""The assistant's tokens of a chat against transformers' `return_assistant_tokens_mask`."""

import dataclasses

import qwen_bpe
import transformers

from vibejax.chat_template import CHATML

CHAT = [
    {"role": "system", "content": "You compute."},
    {"role": "user", "content": "What is 12+34?"},
    {"role": "assistant", "content": "12+34 = 46"},
    {"role": "user", "content": "And twice that?"},
    {
        "role": "assistant",
        "content": "<think>\n2 * 46\n</think>\n\n92 <|im_start|> is \\boxed{92}\n",
    },
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_ids_and_learnt_tokens_are_transformers_own():
    ours = qwen_bpe.build()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend)
    want = theirs.apply_chat_template(
        CHAT, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(want["assistant_masks"]) > 20
    for template in (MARKED, CHATML):
        ids, owners = dataclasses.replace(ours, template=template).encode_turns(CHAT)
        assert ids == want["input_ids"][:-1]  # but for the line break behind the last turn
        assert [int(owner >= 0) for owner in owners] == want["assistant_masks"][:-1]
