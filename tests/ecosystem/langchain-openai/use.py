"""LangChain: `OpenAI` and `ChatOpenAI`, whole, streamed, in batches, in a chain, and with structured output."""

import os
from typing import Literal

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

where = {"base_url": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"], "model": os.environ["MODEL"]}

llm = OpenAI(**where, max_tokens=40, seed=7)
text = llm.invoke("ROMEO:")
assert len(text) == 40, text
assert "".join(llm.stream("ROMEO:")) == text
assert llm.batch(["ROMEO:", "JULIET:"])[0] == text
assert llm.generate(["ROMEO:", "JULIET:"]).llm_output["token_usage"]["completion_tokens"] == 80

chat = ChatOpenAI(**where, max_tokens=40, seed=7)
answer = chat.invoke([("system", "A play."), ("human", "Who goes there?")])
assert answer.content
assert answer.usage_metadata["output_tokens"] <= 40
assert "".join(chunk.content for chunk in chat.stream([("system", "A play."), ("human", "Who goes there?")])) == (
    answer.content
)
chain = ChatPromptTemplate.from_messages([("human", "Who is {name}?")]) | chat | StrOutputParser()
assert chain.invoke({"name": "Romeo"})


class Line(BaseModel):
    """A line of a play."""

    speaker: Literal["ROMEO", "JULIET"] = Field(description="who speaks")
    aside: bool
    words: list[int]


speaker = ChatOpenAI(**where | {"model": os.environ["FORMS_MODEL"]}, max_tokens=200, seed=7)
line = speaker.with_structured_output(Line).invoke("Who goes there?")
assert isinstance(line, Line)
assert speaker.with_structured_output(Line, method="json_schema", strict=True).invoke("Who goes there?") == line
assert isinstance(speaker.with_structured_output(Line.model_json_schema()).invoke("Who goes there?"), dict)
assert isinstance(speaker.with_structured_output(None, method="json_mode").invoke("Who goes there?"), dict)

vectors = OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_documents(["ROMEO:", "JULIET:"])
assert len(vectors) == 2
print("ok")
