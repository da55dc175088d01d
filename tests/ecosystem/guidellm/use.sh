# guidellm: a benchmark of completions with prompts that it makes itself.
set -eu
mkdir tokenizer
for file in tokenizer.json tokenizer_config.json; do
  curl -sf -H "Authorization: Bearer $API_KEY" "$BASE_URL/models/$MODEL/$file" -o "tokenizer/$file"
done
guidellm benchmark run --target "$HOST_URL" --model "$MODEL" --processor tokenizer --request-type text_completions \
  --backend-kwargs "{\"api_key\": \"$API_KEY\"}" --data "prompt_tokens=32,output_tokens=24" --profile synchronous \
  --max-requests 4 --output-dir . --outputs json
python - <<PYTHON
import json

report = json.load(open("benchmarks.json"))
(benchmark,) = report["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (4, 0), totals
PYTHON
echo ok
