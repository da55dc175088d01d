# guidellm: a benchmark of completions, with prompts that it makes itself.
set -eu
mkdir tokenizer
for file in tokenizer.json tokenizer_config.json; do
  curl -sf -H "Authorization: Bearer $API_KEY" "$BASE_URL/models/$MODEL/$file" -o "tokenizer/$file"
done
guidellm run \
  --backend "kind=openai_http,target=$HOST_URL,model=$MODEL,api_key=$API_KEY,request_format=/v1/completions" \
  --tokenizer "kind=huggingface_auto,model=$PWD/tokenizer" \
  --data kind=synthetic_text,prompt_tokens=32,output_tokens=24 \
  --profile kind=synchronous --constraint kind=max_requests,count=4 \
  --output kind=json,path=benchmarks.json --disable-console-interactive
python - <<PYTHON
import json

(benchmark,) = json.load(open("benchmarks.json"))["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (4, 0), totals
PYTHON
echo ok
