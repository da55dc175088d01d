"""LlamaIndex: `OpenAILike` as a completion model and as a chat model, whole and streamed."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

where = {"api_base": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"], "model": os.environ["MODEL"]}
seed = {"additional_kwargs": {"seed": 7}}

text = OpenAILike(**where, is_chat_model=False, max_tokens=40, **seed)
whole = text.complete("ROMEO:").text
assert len(whole) == 40
assert list(text.stream_complete("ROMEO:"))[-1].text == whole

chat = OpenAILike(**where, is_chat_model=True, max_tokens=40, **seed)
messages = [ChatMessage(role="system", content="A play."), ChatMessage(role="user", content="Who goes there?")]
answer = chat.chat(messages).message.content
assert answer
assert list(chat.stream_chat(messages))[-1].message.content == answer
assert chat.complete("Who goes there?").text
print("ok")
