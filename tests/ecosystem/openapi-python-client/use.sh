# A client that openapi-python-client generates from the API's own description, without a warning: it leaves out what it
# can't express, and says so.
set -eu
curl -sf -H "Authorization: Bearer $API_KEY" "$HOST_URL/openapi.json" -o openapi.json
openapi-python-client generate --path openapi.json --meta none --output-path generated --fail-on-warning
python - <<PYTHON
import json
import os
from importlib import import_module
from pathlib import Path

from generated import AuthenticatedClient
from generated.api.chat import chat_create
from generated.api.completions import completions_create
from generated.models import ChatBody, CompletionBody, ErrorAnswer, Message, MessageRole

described = json.loads(Path("openapi.json").read_text())["paths"]
calls = [path for path in Path("generated/api").glob("*/*.py") if path.name != "__init__.py"]
assert len(calls) == sum(len(methods) for methods in described.values()), calls
for path in calls:
    assert callable(import_module(".".join(path.with_suffix("").parts)).sync_detailed)

client = AuthenticatedClient(base_url=os.environ["HOST_URL"], token=os.environ["API_KEY"])
model = os.environ["MODEL"]
body = CompletionBody(prompt="ROMEO:", model=model, max_tokens=40, seed=7)
answer = completions_create.sync(client=client, body=body)
assert len(answer.choices[0].text) == 40
assert answer.usage.completion_tokens == 40
body.max_tokens = -1
refusal = completions_create.sync(client=client, body=body)
assert isinstance(refusal, ErrorAnswer)
assert refusal.error.param == "max_tokens"

question = Message(role=MessageRole.USER, content="Who goes there?")
chat = ChatBody(messages=[question], model=model, max_tokens=40, seed=7)
assert chat_create.sync(client=client, body=chat).choices[0].message.content
PYTHON
echo ok
