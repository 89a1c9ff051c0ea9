"""chat.json: what is written is read back, and nonsense is refused by name."""

import pytest

from tpu_stack.data.chat_format import CHAT, ChatFormat
from tpu_stack.errors import UserError

QWEN = ChatFormat("{{ messages }} ä", None, "<|im_end|>", (7, 3), False)


def test_a_format_is_read_back(tmp_path):
    (tmp_path / CHAT).write_text(QWEN.to_json(), encoding="utf-8")
    assert ChatFormat.read(tmp_path) == QWEN
    assert ChatFormat.read(tmp_path / "elsewhere") == ChatFormat()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"template": ""}', "template"),
        ('{"add_bos": 1}', "add_bos"),
        ('{"eos_token": 2}', "eos_token"),
        ('{"stop_tokens": [true]}', "no token id"),
        ('{"stop_tokens": [-1]}', "no token id"),
    ],
)
def test_nonsense_is_refused(text, word):
    with pytest.raises(UserError, match=word):
        ChatFormat.from_json(text)
