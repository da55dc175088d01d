"""The official Python client: completions, chat, streams, forms, an abort, a refusal, and models."""

import os
import re
from typing import Literal

from openai import BadRequestError, OpenAI, RateLimitError
from pydantic import BaseModel

client = OpenAI(base_url=os.environ["BASE_URL"], api_key=os.environ["API_KEY"])
model = os.environ["MODEL"]
question = [{"role": "system", "content": "A play."}, {"role": "user", "content": "Who goes there?"}]

# A completion, and the same as a stream.
whole = client.completions.create(model=model, prompt="ROMEO:", max_tokens=40, seed=7, logprobs=2)
assert whole.usage.completion_tokens == len(whole.choices[0].text) == 40
assert len(whole.choices[0].logprobs.token_logprobs) == 40
stream = client.completions.create(
    model=model, prompt="ROMEO:", max_tokens=40, seed=7, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
assert chunks[-1].usage.completion_tokens == 40

# How likely a text is.
score = client.completions.create(model=model, prompt="To be, or not to be", max_tokens=0, echo=True, logprobs=0)
assert sum(score.choices[0].logprobs.token_logprobs[1:]) < 0

# A chat, and the same as a stream.
chat = client.chat.completions.create(model=model, messages=question, max_completion_tokens=200, seed=7)
assert chat.choices[0].message.role == "assistant"
assert chat.choices[0].message.content
with client.chat.completions.create(
    model=model, messages=question, max_completion_tokens=200, seed=7, stream=True
) as events:
    streamed = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
assert streamed == chat.choices[0].message.content
with client.chat.completions.stream(model=model, messages=question, max_completion_tokens=200, seed=7) as events:
    assert events.get_final_completion().choices[0].message.content == streamed

# Log-probabilities of a chat.
scored = client.chat.completions.create(
    model=model, messages=question, max_completion_tokens=20, seed=7, logprobs=True, top_logprobs=2
)
assert len(scored.choices[0].logprobs.content) == scored.usage.completion_tokens


# Forms: an object of a class, whole and streamed; any object; and in the words of vLLM.
class Line(BaseModel):
    speaker: Literal["ROMEO", "JULIET"]
    aside: bool
    words: list[int]
    mood: str | None


wanted = {"model": os.environ["FORMS_MODEL"], "messages": question, "max_tokens": 200, "seed": 7}
parsed = client.chat.completions.parse(**wanted, response_format=Line)
line = parsed.choices[0].message.parsed
assert isinstance(line, Line)
with client.chat.completions.stream(**wanted, response_format=Line) as events:
    assert events.get_final_completion().choices[0].message.parsed == line
several = client.chat.completions.parse(**wanted, response_format=Line, n=5)
assert len({repr(choice.message.parsed) for choice in several.choices}) > 1
anything = client.chat.completions.create(**wanted, response_format={"type": "json_object"})
assert anything.choices[0].message.content.startswith("{")
chosen = client.completions.create(
    model=model, prompt="ROMEO:", extra_body={"structured_outputs": {"choice": ["Ay", "Nay"]}}
)
assert (chosen.choices[0].text in ("Ay", "Nay"), chosen.choices[0].finish_reason) == (True, "stop")
words = client.completions.create(model=model, prompt="ROMEO:", extra_body={"guided_regex": "([a-z]+, ){2}[a-z]+"})
assert re.fullmatch("([a-z]+, ){2}[a-z]+", words.choices[0].text)
try:
    client.chat.completions.create(**wanted | {"max_tokens": 5}, response_format={"type": "json_object"}, stop="}")
    client.chat.completions.parse(**wanted | {"max_tokens": 5}, response_format=Line)
except BadRequestError as error:
    assert error.param == "max_tokens"
else:
    raise AssertionError("a form was accepted that needs more than max_tokens")

# A stream that its reader leaves: the server stops and serves the next request.
with client.completions.create(model=model, prompt="ROMEO:", max_tokens=10_000_000, stream=True) as long:
    assert next(iter(long)).choices[0].text
assert client.completions.create(model=model, prompt="ROMEO:", max_tokens=1).choices[0].text

# Refusals have the client's own types.
try:
    client.completions.create(model=model, prompt="ROMEO:", max_tokens=-1)
except BadRequestError as error:
    assert error.param == "max_tokens"
else:
    raise AssertionError("max_tokens=-1 was accepted")

# Overload: one key may have four streams here. A fifth is refused, and served once a stream has ended.
patient, hasty = client.with_options(max_retries=8), client.with_options(max_retries=0)
endless = {"model": model, "prompt": "ROMEO:", "max_tokens": 10_000_000, "stream": True}
streams = [patient.completions.create(**endless) for _ in range(4)]
try:
    hasty.completions.create(**endless)
except RateLimitError as error:
    assert int(error.response.headers["retry-after"]) >= 1
else:
    raise AssertionError("a fifth stream was served")
streams.pop().close()
streams.append(patient.completions.create(**endless))
assert next(iter(streams[-1])).choices[0].text
for each in streams:
    each.close()

# Models are listed by the name that requests use.
assert model in [each.id for each in client.models.list()]
assert client.models.retrieve(model).id.startswith(model)
print("ok")
