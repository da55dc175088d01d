"""LiteLLM: `text_completion` and `completion`, whole and streamed, with a form, and its asynchronous calls."""

import asyncio
import os

import litellm
from pydantic import BaseModel

litellm.drop_params = False
where = {"api_base": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"]}
text_model, chat_model = f"text-completion-openai/{os.environ['MODEL']}", f"openai/{os.environ['MODEL']}"
messages = [{"role": "system", "content": "A play."}, {"role": "user", "content": "Who goes there?"}]

whole = litellm.text_completion(model=text_model, prompt="ROMEO:", max_tokens=40, seed=7, **where)
assert len(whole.choices[0].text) == 40
stream = litellm.text_completion(model=text_model, prompt="ROMEO:", max_tokens=40, seed=7, stream=True, **where)
assert "".join(chunk.choices[0].text or "" for chunk in stream) == whole.choices[0].text
several = litellm.text_completion(model=text_model, prompt=["ROMEO:", "JULIET:"], max_tokens=10, **where)
assert len(several.choices) == 2

chat = litellm.completion(model=chat_model, messages=messages, max_tokens=40, seed=7, **where)
assert chat.choices[0].message.content
assert 0 < chat.usage.completion_tokens <= 40
stream = litellm.completion(model=chat_model, messages=messages, max_tokens=40, seed=7, stream=True, **where)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.choices[0].message.content


class Line(BaseModel):
    speaker: str
    aside: bool


form = {"model": f"openai/{os.environ['FORMS_MODEL']}", "messages": messages, "max_tokens": 100, "seed": 7, **where}
Line.model_validate_json(litellm.completion(response_format=Line, **form).choices[0].message.content)
assert litellm.completion(response_format={"type": "json_object"}, **form).choices[0].message.content.startswith("{")


async def ask() -> str:
    answer = await litellm.acompletion(model=chat_model, messages=messages, max_tokens=40, seed=7, **where)
    return answer.choices[0].message.content


assert asyncio.run(ask()) == chat.choices[0].message.content
try:
    litellm.text_completion(model=text_model, prompt="ROMEO:", max_tokens=-1, **where)
except litellm.BadRequestError as error:
    assert "max_tokens" in str(error)
else:
    raise AssertionError("max_tokens=-1 was accepted")
vectors = litellm.embedding(model=chat_model, input=["ROMEO:", "JULIET:"], **where)
assert len(vectors.data) == 2
print("ok")
