# lm-evaluation-harness: `local-completions` with the server's own tokenizer, rolling perplexity, and a chat.
set -eu
cp "$HERE"/*.yaml "$HERE"/*.jsonl .
export OPENAI_API_KEY="$API_KEY"
completions="model=$MODEL,base_url=$BASE_URL/completions"

# In its default way, it finds the routes of the server for tokens.
lm_eval run --model local-completions --model_args "$completions,auth_token=$API_KEY" \
  --tasks play_perplexity,play_answer --include_path . --output_path remote

# With the files of the tokenizer.
mkdir tokenizer
for file in tokenizer.json tokenizer_config.json; do
  curl -sf -H "Authorization: Bearer $API_KEY" "$BASE_URL/models/$MODEL/$file" -o "tokenizer/$file"
done
lm_eval run --model local-completions --model_args "$completions,tokenizer_backend=huggingface,tokenizer=tokenizer" \
  --tasks play_perplexity --include_path . --output_path files

lm_eval run --model local-chat-completions --model_args "model=$MODEL,base_url=$BASE_URL/chat/completions" \
  --apply_chat_template --tasks play_answer --include_path . --output_path chat

python - <<PYTHON
import json
from pathlib import Path

def results(name):
    (path,) = Path(name).rglob("results_*.json")
    return json.loads(path.read_text())["results"]

remote, files = (results(name)["play_perplexity"]["bits_per_byte,none"] for name in ("remote", "files"))
assert abs(remote - files) < 1e-6, (remote, files)
assert 0.5 < remote < 4, remote
assert "play_answer" in results("chat")
PYTHON
echo ok
